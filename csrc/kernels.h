// What the kernels of every device take: raw pointers and sizes, no tensors. T is the type gates and sums are computed
// in: float, or double for float64 tensors.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "gate.h"

namespace mrvae {

// float16 is stored on a GPU only: the CPU computes it in a float32 copy.
enum class Storage { Float, Double, BFloat16, Half };

// ---- gates: g[n, i] = act(sum_k w_k[i] P_k(eta[n]) + c[i]), k < degree ---------------------------------------------

// w_0 to w_(degree - 1), `stride` apart, and c of all gates, flat; or what they get as gradients.
template <class T>
struct GateParameters {
  T *weight, *bias;
  std::int64_t stride;
  int degree;
  MRVAE_HOST_DEVICE GateParameters from(std::int64_t i) const { return {weight + i, bias + i, stride, degree}; }
  MRVAE_HOST_DEVICE T* row(int k) const { return weight + k * stride; }
};

// f(degree), as a constant of the compiler's
template <class F>
void with_degree(int degree, const F& f) {
  switch (degree) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    default: return f(std::integral_constant<int, gate_degrees>());
  }
}

// One layer's part of the flat parameters. `values` is (samples, size), written by the forward pass and read as dL/dg by
// the backward pass, where nullptr stands for zero.
template <class T>
struct GateSlice {
  std::int64_t offset, size;
  Gate kind;
  T* values;
};

// ---- epilogue: y = activation(g * (u + b) + t) --------------------------------------------------------------------

// Element (p, r, c, i) of u lies at ((p * rows + r) * channels + c) * inner + i. `samples` is 1 when one gate serves the
// whole batch; otherwise gate and shift are (samples, channels).
struct EpilogueShape {
  std::int64_t samples, rows, channels, inner;
};

// A Linear with one beta a sample: nothing is summed for a gate.
inline bool one_element_a_gate(const EpilogueShape& s) { return s.samples > 1 && s.rows * s.inner == 1; }

template <class T>
struct EpilogueParameters {
  const T* gate;
  const T* bias;   // (channels,) or nullptr
  const T* shift;  // like gate, or nullptr
  Activation activation;
  // CPU, backward pass: what is given for u is y, of no activation or ReLU; u + b = (y - t) / g, and a gate of exactly 0
  // gets no gradient. The bias is not read.
  bool of_result = false;
};

// dz = dy * activation'(z); du = g * dz; dshift = sum dz; dgate = sum dz * (u + b); dbias = sum_p g * dshift. Any of the
// targets may be nullptr; dgate and dshift are (samples, channels), on the CPU each for itself, on a GPU both or none, and
// there with dbias.
template <class T>
struct EpilogueGradients {
  void* u;
  T* gate;
  T* shift;
  T* bias;
};

// ---- fold: W' = g W, b' = g b + t ---------------------------------------------------------------------------------

// One layer. Element (k, o, c, i) of the weight lies at ((k * outer + o) * channels + c) * inner + i, and its output
// channel is k * channels + c: k counts the groups of a transposed convolution and is 0 otherwise.
// Pointers of type `const void*` hold `storage`; the others hold float, or double for Storage::Double.
struct FoldLayer {
  Storage storage;
  std::int64_t groups, outer, channels, inner;
  const void* weight;
  const void* gate;
  const void* bias;         // or nullptr
  const void* shift;        // or nullptr
  void* folded;             // forward: W'
  void* folded_bias;        // forward: b', or nullptr
  const void* grad;         // backward: dW', or nullptr for zero
  const void* grad_bias;    // backward: db', or nullptr for zero
  void* grad_weight;        // backward: dW = g dW', or nullptr; may be the memory of `grad`
  void* grad_gate;          // backward: <dW', W> per channel + db' b, or nullptr
  void* grad_layer_bias;    // backward: g db', or nullptr
  void* grad_shift;         // backward: db', or nullptr
};

}  // namespace mrvae

// The CPU kernels: raw pointers and sizes, no tensors. T is the type gates and sums are computed in: float, or double
// for float64 tensors. Every kernel gives the same bits for any number of threads: work is cut by shape alone.
#pragma once

#include <cstdint>
#include <vector>

#include "../gate.h"

namespace mrvae::cpu {

enum class Storage { Float, Double, BFloat16 };

// ---- gates: g[n, i] = act(w[i] * eta[n] + c[i]) ------------------------------------------------------------------

// One layer's part of the flat w and c. `values` is (samples, size), written by the forward pass and read as dL/dg by
// the backward pass, where nullptr stands for zero.
template <class T>
struct GateSlice {
  std::int64_t offset, size;
  Gate kind;
  T* values;
};

template <class T>
void gates_forward(const std::vector<GateSlice<T>>& slices, const T* weight, const T* bias, const T* eta,
                   std::int64_t samples);

// dw = sum_n dp * eta, dc = sum_n dp, deta[n] = sum_i dp * w. `grad_eta` may be nullptr.
template <class T>
void gates_backward(const std::vector<GateSlice<T>>& slices, const T* weight, const T* bias, const T* eta,
                    std::int64_t samples, T* grad_weight, T* grad_bias, T* grad_eta);

// ---- epilogue: y = activation(g * (u + b) + t) --------------------------------------------------------------------

// Element (p, r, c, i) of u lies at ((p * rows + r) * channels + c) * inner + i. `samples` is 1 when one gate serves the
// whole batch; otherwise gate and shift are (samples, channels).
struct EpilogueShape {
  std::int64_t samples, rows, channels, inner;
};

template <class T>
struct EpilogueParameters {
  const T* gate;
  const T* bias;   // (channels,) or nullptr
  const T* shift;  // like gate, or nullptr
  Activation activation;
};

void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<float>& with,
                      void* y);
void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<double>& with,
                      void* y);

// dz = dy * activation'(z); du = g * dz; dshift = sum dz; dgate = sum dz * (u + b); dbias = sum_p g * dshift. Any of the
// targets may be nullptr; dgate and dshift are (samples, channels) and come together or not at all.
template <class T>
struct EpilogueGradients {
  void* u;
  T* gate;
  T* shift;
  T* bias;
};

void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<float>& with, const EpilogueGradients<float>& out);
void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<double>& with, const EpilogueGradients<double>& out);

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
};

void fold_forward(const std::vector<FoldLayer>& layers);
void fold_backward(const std::vector<FoldLayer>& layers);

}  // namespace mrvae::cpu

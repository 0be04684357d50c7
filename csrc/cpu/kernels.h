// The CPU kernels. Every kernel gives the same bits for any number of threads: work is cut by shape alone. Storage is
// float, double or bfloat16.
#pragma once

#include "../kernels.h"

namespace mrvae::cpu {

// ---- gates ----------------------------------------------------------------------------------------------------------

template <class T>
void gates_forward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                   std::int64_t samples);

// dw_k = sum_n dp P_k(eta), dc = sum_n dp, deta[n] = sum_i dp sum_k w_k P_k'(eta). `grad_eta` may be nullptr.
template <class T>
void gates_backward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                    std::int64_t samples, const GateParameters<T>& grads, T* grad_eta);

// ---- epilogue: y = activation(g * (u + b) + t) --------------------------------------------------------------------

void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<float>& with,
                      void* y);
void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<double>& with,
                      void* y);

void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<float>& with, const EpilogueGradients<float>& out);
void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<double>& with, const EpilogueGradients<double>& out);

// Whether y = g v tells v, for all gates: none too small a number, nor, if positive, below 0. A gate of exactly 0 passes
// where `zeros`.
template <class T>
bool divisible(const T* gate, std::int64_t n, bool positive, bool zeros);
// Whether y = g v + t tells v to 256 of the last digits of 1, for all gates and shifts: |t| <= 256 g.
template <class T>
bool separable(const T* gate, const T* shift, std::int64_t n);

// Both of n gates and shifts that are yet to be made, for every eta from low to high.
template <class T>
bool divisible(const GateParameters<const T>& gates, Gate kind, std::int64_t n, T low, T high);
template <class T>
bool separable(const GateParameters<const T>& gates, Gate kind, const GateParameters<const T>& shifts, std::int64_t n,
               T low, T high);

// ---- epilogue of (samples, channels) with a gate for each element, and a shift, made of their parameters and eta ------

template <class T>
struct SampleEpilogue {
  std::int64_t samples, channels;
  GateParameters<const T> gates;  // of these channels
  const T* eta;                   // (samples,)
  Gate kind;
  const T* bias;  // (channels,) or nullptr
  Activation activation;
  GateParameters<const T> shifts{};  // likewise; weight nullptr for none
  bool of_result = false;            // as in EpilogueParameters
};

// Any of them may be nullptr, those of the gates together, and those of the shifts.
template <class T>
struct SampleEpilogueGradients {
  void* u;
  GateParameters<T> gates;  // of these channels
  T* bias;                  // (channels,)
  GateParameters<T> shifts{};
};

template <class T>
void sample_epilogue_forward(Storage storage, const SampleEpilogue<T>& shape, const void* u, void* y);
template <class T>
void sample_epilogue_backward(Storage storage, const SampleEpilogue<T>& shape, const void* grad, const void* u,
                              const SampleEpilogueGradients<T>& out);

// ---- batch norm with an affine a sample: dx = gain dz + slope (x - mean) + constant ----------------------------------

template <class T>
struct SampleNormSlopes {
  const T *gain, *minus_mean, *slope, *constant;  // (samples, channels), then (channels,) each
};

template <class T>
void sample_norm_backward(const EpilogueShape& shape, const T* grad, const T* x, const SampleNormSlopes<T>& with,
                          T* grad_x);

// ---- fold: W' = g W, b' = g b + t ---------------------------------------------------------------------------------

void fold_forward(const std::vector<FoldLayer>& layers);
void fold_backward(const std::vector<FoldLayer>& layers);

}  // namespace mrvae::cpu

// The memory-bound CUDA kernels: launched on a stream of the current device, for any size, deterministic.
//
// Sums over blocks go through `scratch`, device memory of as many bytes as ..._scratch() says, 16-byte aligned; it may
// be nullptr where that is 0. Errors of a launch are std::runtime_error.
#pragma once

#include "../kernels.h"

namespace mrvae::cuda {

using Stream = void*;  // a cudaStream_t

// ---- gates: one launch for 64 slices ------------------------------------------------------------------------------

template <class T>
void gates_forward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                   std::int64_t samples, Stream stream);

// As cpu::gates_backward: one launch for 64 slices, and one more where sums are split over blocks.
template <class T>
std::int64_t gates_backward_scratch(const std::vector<GateSlice<T>>& slices, std::int64_t samples, int degree,
                                    bool grad_eta);
template <class T>
void gates_backward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                    std::int64_t samples, const GateParameters<T>& grads, T* grad_eta, void* scratch, Stream stream);

// ---- epilogue -----------------------------------------------------------------------------------------------------

// y may be the memory of u.
void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<float>& with,
                      void* y, Stream stream);
void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u,
                      const EpilogueParameters<double>& with, void* y, Stream stream);

// As cpu::epilogue_backward; `sums`: gradients of gate, shift or bias are asked for. dy and u are read once.
std::int64_t epilogue_backward_scratch(Storage storage, const EpilogueShape& shape, bool sums);
void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<float>& with, const EpilogueGradients<float>& out, void* scratch,
                       Stream stream);
void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<double>& with, const EpilogueGradients<double>& out, void* scratch,
                       Stream stream);

// ---- fold: one launch for the layers of one storage type, as far as a kernel's arguments hold them ------------------

void fold_forward(const std::vector<FoldLayer>& layers, Stream stream);

// One launch, and one more where the sum over a channel is split over blocks.
std::int64_t fold_backward_scratch(const std::vector<FoldLayer>& layers);
void fold_backward(const std::vector<FoldLayer>& layers, void* scratch, Stream stream);

}  // namespace mrvae::cuda

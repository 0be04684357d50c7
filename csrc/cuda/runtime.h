// What every CUDA source includes: the runtime, or in a build for tests the shim that runs the same source on the CPU.
//
// Kernels use the language's own names (threadIdx, __shared__, __syncthreads, __shfl_xor_sync) and what is below, so that
// the shim sees all that they do. The shim runs one thread of a block at a time and changes its order between barriers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../gate.h"
#include "../storage.h"

#if defined(MRVAE_SHIM)
#include "cuda_shim.h"
#else
#include <cuda_runtime.h>
#endif

namespace mrvae::cuda {

using Stream = void*;  // a cudaStream_t

constexpr unsigned all_lanes = 0xffffffffu;
constexpr int lanes = 32;

#if defined(MRVAE_SHIM)

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(shim::dynamic_shared());
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, Stream,
            Arguments... arguments) {
  shim::run(name, grid, block, shared, [&] { kernel(arguments...); });
}

#else

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char mrvae_dynamic_shared[];
  return reinterpret_cast<T*>(mrvae_dynamic_shared);
}

inline void check(const char* name, cudaError_t error) {
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // else whoever launches next reports this error as his own
    throw std::runtime_error(std::string("the CUDA kernel ") + name + " could not be launched: " +
                             cudaGetErrorString(error));
  }
}

// Launches on the stream, whose device is the current one. std::runtime_error names the kernel and CUDA's reason.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared, Stream stream,
            Arguments... arguments) {
  // more than 48 KB has to be asked for; the driver only notes it, in about a microsecond
  if (shared > 48 * 1024) {
    check(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  check(name, cudaGetLastError());
}

#endif

// ---- 16 bytes at a time ---------------------------------------------------------------------------------------------

// `count` numbers that are read and written as one access.
template <class T, int count>
struct alignas(sizeof(T) * count) Pack {
  T values[count];
};

// ---- sums within a warp and a block ---------------------------------------------------------------------------------

// The sum of all 32 lanes' values, in every lane; the same order each time.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(all_lanes, value, distance);
  }
  return value;
}

}  // namespace mrvae::cuda

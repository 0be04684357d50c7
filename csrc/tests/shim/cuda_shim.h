// CUDA's execution model on the CPU, for tests: compiles a .cu file as C++ and runs its kernels' own source.
//
// Each thread of a block is a fiber, and one runs at a time. Blocks run from the last to the first. Threads run from the
// first to the last until each waits at a barrier or a warp's exchange, then from the last to the first, and so on: a
// kernel that lacks a barrier computes something else. What differs from a GPU, so that it is not shown here: memory
// ordering between blocks that run at the same time, bank conflicts, alignment faults of ordinary loads, and speed.
//
// launch() throws std::runtime_error where a launch is one that CUDA would refuse, where threads wait for each other at
// different places, or where a shuffle reads a lane that does not take part.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static  // one block runs at a time
#define __restrict__ __restrict

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace mrvae::shim {

constexpr std::size_t most_shared = 227 * 1024;  // a block of sm_90

// Of the running thread.
struct Place {
  dim3 thread, block, blocks, threads;
};
const Place& place();

void run(const char* name, dim3 grid, dim3 block, std::size_t shared, const std::function<void()>& thread);
void* dynamic_shared();
void barrier();
bool barrier_or(bool value);
void warp_barrier(unsigned mask);

// Gives every lane in `mask` what lane `source` of the same warp brought; `bytes` at most 64.
void exchange(unsigned mask, const void* mine, void* theirs, std::size_t bytes, int source);
// What all 32 lanes brought, `bytes` each.
const unsigned char* exchange_all(const void* mine, std::size_t bytes);
int lane();

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  T result;
  exchange(mask, &value, &result, sizeof(T), source);
  return result;
}

unsigned ballot(unsigned mask, bool value);

// ---- cuda/tensor_core.h ----------------------------------------------------------------------------------------------

void multiply_bfloat16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void multiply_half(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
void multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
std::uint32_t to_tf32(float value);
void load_matrices(std::uint32_t (&out)[4], const void* row);
void load_matrices_transposed(std::uint32_t (&out)[4], const void* row);

// Copies arrive as late as they may: when the thread waits for them.
void copy_async_bytes(void* target, const void* source, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait_for(int pending);
template <int bytes>
void copy_async(void* target, const void* source, bool valid) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  copy_async_bytes(target, source, bytes, valid);
}
template <int pending>
void copy_async_wait() {
  copy_async_wait_for(pending);
}

}  // namespace mrvae::shim

#define threadIdx (mrvae::shim::place().thread)
#define blockIdx (mrvae::shim::place().block)
#define blockDim (mrvae::shim::place().threads)
#define gridDim (mrvae::shim::place().blocks)

inline void __syncthreads() { mrvae::shim::barrier(); }
inline int __syncthreads_or(int value) { return mrvae::shim::barrier_or(value != 0); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { mrvae::shim::warp_barrier(mask); }
inline unsigned __ballot_sync(unsigned mask, int value) { return mrvae::shim::ballot(mask, value != 0); }
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = mrvae::shim::lane();
  return mrvae::shim::shuffle(mask, value, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = mrvae::shim::lane(), source = lane ^ lanes;
  return mrvae::shim::shuffle(mask, value, source / width <= lane / width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = mrvae::shim::lane(), source = lane + int(lanes);
  return mrvae::shim::shuffle(mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

// The instructions of tensor cores and of asynchronous copies, sm_80 and newer, as functions.
//
// Fragments, for lane l with g = l / 4 and t = l % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16" and ".m16n8k8"):
//
//   16-bit   a[0]: row g, columns 2t and 2t+1; a[1]: row g+8; a[2], a[3]: the same 8 columns further
//            b[0]: rows 2t and 2t+1, column g; b[1]: the same 8 rows further
//   TF32     a[0]: row g, column t; a[1]: row g+8; a[2], a[3]: the same 4 columns further
//            b[0]: row t, column g; b[1]: row t+4
//   sums     d[0], d[1]: row g, columns 2t and 2t+1; d[2], d[3]: row g+8
#pragma once

#include "runtime.h"

namespace mrvae::cuda {

#if defined(MRVAE_SHIM)

using shim::copy_async;
using shim::copy_async_commit;
using shim::copy_async_wait;
using shim::load_matrices;
using shim::load_matrices_transposed;
using shim::multiply_bfloat16;
using shim::multiply_half;
using shim::multiply_tf32;
using shim::to_tf32;

#else

// d += a b for tiles of 16 x 16 and 16 x 8
__device__ __forceinline__ void multiply_bfloat16(float (&d)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_half(float (&d)[4], const std::uint32_t (&a)[4],
                                              const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b for tiles of 16 x 8 and 8 x 8, operands rounded by to_tf32
__device__ __forceinline__ void multiply_tf32(float (&d)[4], const std::uint32_t (&a)[4],
                                              const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The bits of the nearest TF32 number; the tensor cores would cut the last 13 bits off.
__device__ __forceinline__ std::uint32_t to_tf32(float value) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return std::uint32_t(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 tiles of 16-bit numbers from shared memory: lane 8 i + r names row r of tile i, 16 aligned bytes. Afterwards
// out[i] holds of tile i row g, columns 2t and 2t+1.
__device__ __forceinline__ void load_matrices(std::uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same with each tile transposed: out[i] holds of tile i rows 2t and 2t+1, column g.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts copying `bytes` (4, 8 or 16, both pointers aligned to them) to shared memory, or zeros where not `valid`, when
// `source` is not read.
template <int bytes>
__device__ __forceinline__ void copy_async(void* target, const void* source, bool valid) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int size = valid ? bytes : 0;
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(target)), "l"(source), "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(target)), "l"(source),
                 "n"(bytes), "r"(size)
                 : "memory");
  }
}

// Ends a group of the copies that this thread started.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `pending` of this thread's groups, the newest, are under way. Other threads' copies are there after
// a __syncthreads() that follows.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

#endif

}  // namespace mrvae::cuda

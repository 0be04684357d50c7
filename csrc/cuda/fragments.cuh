// A warp's part of a product of two tiles in shared memory, by number type. A tile is stored [rows][depth] ("depth
// inner") or [depth][rows]; rows of the second tile are the result's columns. Results are spread over lanes as mma
// spreads them, for every type: see tensor_core.h.
#pragma once

#include "tensor_core.h"

namespace mrvae::cuda {

// Elements from one line of a tile to the next. Lines that are read together, 8 of 16 bytes by ldmatrix or 4 x 8
// numbers of 32 bits, lie in different banks.
template <class T, bool depth_inner, int inner>
constexpr int line = inner + (depth_inner ? 16 / int(sizeof(T)) : 8);

constexpr int depth_bytes = 64;  // of a tile

template <class T>
struct Half16 {
  using Storage = T;
  static constexpr int depth = 16;  // of one instruction

  template <bool depth_inner, int stride>
  static __device__ __forceinline__ void load_a(std::uint32_t (&a)[4], const T* tile, int row, int k, int lane) {
    if constexpr (depth_inner) {
      load_matrices(a, tile + (row + lane % 16) * stride + k + lane / 16 * 8);
    } else {
      load_matrices_transposed(a, tile + (k + lane / 16 * 8 + lane % 8) * stride + row + lane / 8 % 2 * 8);
    }
  }

  // of 16 columns
  template <bool depth_inner, int stride>
  static __device__ __forceinline__ void load_b(std::uint32_t (&b)[4], const T* tile, int column, int k, int lane) {
    if constexpr (depth_inner) {
      load_matrices(b, tile + (column + lane / 16 * 8 + lane % 8) * stride + k + lane / 8 % 2 * 8);
    } else {
      load_matrices_transposed(b, tile + (k + lane / 8 % 2 * 8 + lane % 8) * stride + column + lane / 16 * 8);
    }
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      multiply_bfloat16(d, a, b);
    } else {
      multiply_half(d, a, b);
    }
  }

  static constexpr std::uint32_t one = std::is_same_v<T, BFloat16> ? 0x3f803f80u : 0x3c003c00u;
};

struct Tf32 {
  using Storage = float;
  static constexpr int depth = 8;

  template <bool depth_inner, int stride>
  static __device__ __forceinline__ std::uint32_t number(const float* tile, int row, int k) {
    return to_tf32(depth_inner ? tile[row * stride + k] : tile[k * stride + row]);
  }

  template <bool depth_inner, int stride>
  static __device__ __forceinline__ void load_a(std::uint32_t (&a)[4], const float* tile, int row, int k, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = number<depth_inner, stride>(tile, row + lane / 4 + i % 2 * 8, k + lane % 4 + i / 2 * 4);
    }
  }

  template <bool depth_inner, int stride>
  static __device__ __forceinline__ void load_b(std::uint32_t (&b)[4], const float* tile, int column, int k, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i] = number<depth_inner, stride>(tile, column + lane / 4 + i / 2 * 8, k + lane % 4 + i % 2 * 4);
    }
  }

  static __device__ __forceinline__ void multiply(float (&d)[4], const std::uint32_t (&a)[4],
                                                  const std::uint32_t (&b)[2]) {
    multiply_tf32(d, a, b);
  }

  static constexpr std::uint32_t one = 0x3f800000u;
};

// float32 by fused multiply-add.
struct Plain {
  using Storage = float;
};

// sums += a b over the tile's depth for 16 M rows from `row` and 8 N columns from `column`; row_sums likewise of a and
// ones, in each of 8 columns, where `add_rows`.
template <class Math, int M, int N, bool a_inner, bool b_inner, int a_line, int b_line>
__device__ __forceinline__ void multiply_tiles(float (&sums)[M][N][4], float (&row_sums)[M][4], bool add_rows,
                                               const typename Math::Storage* a, const typename Math::Storage* b,
                                               int row, int column) {
  constexpr int depth = depth_bytes / int(sizeof(typename Math::Storage));
  const int lane = int(threadIdx.x) % lanes;
  if constexpr (std::is_same_v<Math, Plain>) {
    const int g = lane / 4, t = lane % 4;
    constexpr int width = a_inner && b_inner ? 4 : 1;
#pragma unroll 1
    for (int k = 0; k < depth; k += width) {
      Pack<float, width> left[2 * M];
#pragma unroll
      for (int i = 0; i < 2 * M; ++i) {
        const int r = row + g + 8 * i;
        left[i] = *reinterpret_cast<const Pack<float, width>*>(a_inner ? a + r * a_line + k : a + k * a_line + r);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        Pack<float, width> right[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int c = column + 8 * j + 2 * t + i;
          right[i] = *reinterpret_cast<const Pack<float, width>*>(b_inner ? b + c * b_line + k : b + k * b_line + c);
        }
#pragma unroll
        for (int d = 0; d < 4 * M; ++d) {
#pragma unroll
          for (int v = 0; v < width; ++v) {
            float& sum = sums[d / 4][j][d % 4];
            sum = std::fma(left[d / 2].values[v], right[d % 2].values[v], sum);
          }
        }
      }
      if (add_rows) {
#pragma unroll
        for (int d = 0; d < 4 * M; ++d) {
#pragma unroll
          for (int v = 0; v < width; ++v) row_sums[d / 4][d % 4] += left[d / 2].values[v];
        }
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < depth; k += Math::depth) {
      std::uint32_t left[M][4], right[N / 2][4];
#pragma unroll
      for (int i = 0; i < M; ++i) Math::template load_a<a_inner, a_line>(left[i], a, row + 16 * i, k, lane);
#pragma unroll
      for (int j = 0; j < N / 2; ++j) Math::template load_b<b_inner, b_line>(right[j], b, column + 16 * j, k, lane);
#pragma unroll
      for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const std::uint32_t pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          Math::multiply(sums[i][j], left[i], pair);
        }
      }
      if (add_rows) {
        const std::uint32_t ones[2] = {Math::one, Math::one};
#pragma unroll
        for (int i = 0; i < M; ++i) Math::multiply(row_sums[i], left[i], ones);
      }
    }
  }
}

}  // namespace mrvae::cuda

// The end of `convolve`: each warp takes its sums through its own part of shared memory, so that neighbouring lanes
// write neighbouring places of y, whether channels or positions are innermost there.
#pragma once

#include "mainloop.cuh"
#include "products.h"

namespace mrvae::cuda {

template <class T>
struct Result {
  T *y, *kept;
  Steps steps;
  int rows, columns, height, width;  // rows of the product, columns of a group, size of the image
  Divider span, across;              // rows are positions n, a, b of one phase
  Pair phases;                       // p = a phases.h + phase.h
  bool wide, positions_inner;        // four columns are one aligned access; neighbouring rows are neighbours in memory
  const void* bias;
  Parameter bias_type;
  const float *gate, *shift;
  Divider rows_per_gate;
  bool per_sample, keep_product;
  Activation activation;
};

__device__ __forceinline__ float parameter(const void* values, Parameter type, std::int64_t i) {
  switch (type) {
    case Parameter::BFloat16: return load(static_cast<const BFloat16*>(values)[i]);
    case Parameter::Half: return load(static_cast<const Half*>(values)[i]);
    case Parameter::Double: return float(static_cast<const double*>(values)[i]);
    default: return static_cast<const float*>(values)[i];
  }
}

template <class T>
__device__ __forceinline__ float rounded(float value) {
  T stored;
  store(stored, value);
  return load(stored);
}

template <class T>
__device__ __forceinline__ void write_four(T* target, const Steps& steps, const float (&values)[4], int count,
                                           bool wide) {
  Pack<T, 4> pack;
#pragma unroll
  for (int v = 0; v < 4; ++v) store(pack.values[v], values[v]);
  if (wide && count >= 4) {
    *reinterpret_cast<Pack<T, 4>*>(target) = pack;
  } else {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (v < count) target[v * steps.c] = pack.values[v];
    }
  }
}

// Four columns of one row.
template <class T>
__device__ __forceinline__ void finish_four(const Result<T>& to, const float (&sums)[4], int row, int column, int group,
                                            Pair phase) {
  const int count = to.columns - column;
  if (row >= to.rows || count <= 0) return;
  const int n = to.span.quotient(row), rest = row - n * int(to.span.by);
  const int a = to.across.quotient(rest), b = rest - a * int(to.across.by);
  const int p = a * to.phases.h + phase.h, q = b * to.phases.w + phase.w;
  if (p >= to.height || q >= to.width) return;
  const std::int64_t channel = std::int64_t(group) * to.columns + column;
  const std::int64_t at = n * to.steps.n + p * to.steps.h + q * to.steps.w + channel * to.steps.c;

  float z[4];
#pragma unroll
  for (int v = 0; v < 4; ++v) z[v] = sums[v];
  if (to.gate != nullptr) {
    const std::int64_t row_of_gate =
        to.per_sample ? std::int64_t(to.rows_per_gate.quotient(n)) * (gridDim.z * std::int64_t(to.columns)) : 0;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      // the backward pass sees u in y's type: unrounded here, ReLU's slope there could be that of the other side
      if (to.per_sample) z[v] = rounded<T>(z[v]);
      if (v < count) {
        if (to.bias != nullptr) z[v] += parameter(to.bias, to.bias_type, channel + v);
        const float shift = to.shift != nullptr ? __ldg(to.shift + row_of_gate + channel + v) : 0.0f;
        // rounded once, as the compiler rounds g u + t in the backward pass
        z[v] = std::fma(z[v], __ldg(to.gate + row_of_gate + channel + v), shift);
      }
    }
    if (to.kept != nullptr) {
      if (to.keep_product) {
        write_four(to.kept + at, to.steps, sums, count, to.wide);
      } else {
        write_four(to.kept + at, to.steps, z, count, to.wide);
      }
    }
    activate_all(z, to.activation);
  }
  write_four(to.y + at, to.steps, z, count, to.wide);
}

template <class T, class Shape>
constexpr int epilogue_bytes = Shape::threads / lanes * (Shape::warp_rows < 32 ? Shape::warp_rows : 32) *
                               (Shape::warp_columns + 8) * int(sizeof(float));

template <class T, class Shape>
__device__ __forceinline__ void write_block(const Result<T>& to, const float (&sums)[Shape::M][Shape::N][4],
                                            int first_row, int first_column, int group, Pair phase) {
  constexpr int slice = Shape::warp_rows < 32 ? Shape::warp_rows : 32, columns = Shape::warp_columns;
  const int warp = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes, g = lane / 4, t = lane % 4;
  const int stride = columns + (to.positions_inner ? 1 : 8);  // of different banks, in both orders
  float* const own = dynamic_shared<float>() + warp * slice * (columns + 8);
  const int row = first_row + warp / Shape::across * Shape::warp_rows;
  const int column = first_column + warp % Shape::across * columns;
#pragma unroll
  for (int start = 0; start < Shape::warp_rows; start += slice) {
#pragma unroll
    for (int i = 0; i < slice / 16; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::N; ++j) {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          own[(16 * i + g + d / 2 * 8) * stride + 8 * j + 2 * t + d % 2] = sums[start / 16 + i][j][d];
        }
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int item = lane; item < slice * (columns / 4); item += lanes) {
      const int r = to.positions_inner ? item % slice : item / (columns / 4);
      const int c = 4 * (to.positions_inner ? item / slice : item % (columns / 4));
      float four[4];
#pragma unroll
      for (int v = 0; v < 4; ++v) four[v] = own[r * stride + c + v];
      finish_four(to, four, row + start + r, column + c, group, phase);
    }
    __syncwarp();
  }
}

}  // namespace mrvae::cuda

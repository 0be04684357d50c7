// The kernel `weight_gradient`, and its launch for one number type. See products.h.
//
// Rows of the product are channels of a, columns are taps and channels of b as one axis, the reduction runs over
// positions of a, of which each block takes a part. Sums go to memory in float32, one copy of the weight a part, which
// `finish` adds in order: the same bits each time.
//
// Grid: tiles, parts, groups. Bytes: a once for each column of tiles, b once for each row of tiles and each tap that
// meets it, mostly from L2; the parts.
#pragma once

#include "mainloop.cuh"
#include "products.h"

namespace mrvae::cuda {

template <class T>
struct WeightGradientArguments {
  Operand<T> a, b;
  float *parts, *sums;
  std::int64_t a_group, b_group, a_saved_group, b_saved_group;
  int columns, chunk, row_tiles, column_tiles;  // columns of all taps
};

template <class Math, class Shape, bool staged>
__global__ void __launch_bounds__(Shape::threads, resident<Shape, staged>)
    weight_gradient_kernel(const WeightGradientArguments<typename Math::Storage> arguments) {
  using T = typename Math::Storage;
  constexpr int depth = depth_bytes / int(sizeof(T));
  constexpr int a_line = tile_line<T, false, Shape::rows>, b_line = tile_line<T, false, Shape::columns>;
  const int split = int(blockIdx.y), group = int(blockIdx.z);
  const int tile_row = int(blockIdx.x) % arguments.row_tiles, tile_column = int(blockIdx.x) / arguments.row_tiles;
  const int row = tile_row * Shape::rows, column = tile_column * Shape::columns;
  const int start = split * arguments.chunk;
  const int end = arguments.a.positions.end - start < arguments.chunk ? arguments.a.positions.end
                                                                      : start + arguments.chunk;

  Operand<T> from_a = arguments.a, from_b = arguments.b;
  from_a.positions.end = from_b.positions.end = end;
  from_a.data += group * arguments.a_group, from_b.data += group * arguments.b_group;
  if (from_a.saved != nullptr) from_a.saved += group * arguments.a_saved_group;
  if (from_b.saved != nullptr) from_b.saved += group * arguments.b_saved_group;

  float sums[Shape::M][Shape::N][4] = {}, row_sums[Shape::M][4] = {};
  using A = std::conditional_t<staged, StagedLoader<T, Shape::threads, depth, Shape::rows, a_line, true>,
                               AsyncLoader<T, Shape::threads, depth, Shape::rows, a_line, true>>;
  using B = std::conditional_t<staged, StagedLoader<T, Shape::threads, depth, Shape::columns, b_line, true>,
                               AsyncLoader<T, Shape::threads, depth, Shape::columns, b_line, true>>;
  const int warp = int(threadIdx.x) / lanes, lane = int(threadIdx.x) % lanes, g = lane / 4, t = lane % 4;
  const bool adds_rows = arguments.sums != nullptr && tile_column == 0 && warp % Shape::across == 0;
  A a(from_a, start, row);
  B b(from_b, start, column);
  multiply_block<Math, Shape, false, false>(sums, row_sums, adds_rows, a, b, (end - start + depth - 1) / depth);

  const int rows = arguments.a.taps.channels, all_rows = rows * int(gridDim.z);
  const int first_row = row + warp / Shape::across * Shape::warp_rows + g;
  const int first_column = column + warp % Shape::across * Shape::warp_columns + 2 * t;
#pragma unroll
  for (int i = 0; i < 2 * Shape::M; ++i) {
    const int r = first_row + 8 * i;
    if (r >= rows) continue;
    const std::int64_t line = std::int64_t(split) * all_rows + group * rows + r;
    float* const to = arguments.parts + line * arguments.columns;
#pragma unroll
    for (int j = 0; j < Shape::N; ++j) {
      const int c = first_column + 8 * j;
      const float first = sums[i / 2][j][i % 2 * 2], second = sums[i / 2][j][i % 2 * 2 + 1];
      if (c + 1 < arguments.columns && arguments.columns % 2 == 0) {
        *reinterpret_cast<float2*>(to + c) = {first, second};
      } else {
        if (c < arguments.columns) to[c] = first;
        if (c + 1 < arguments.columns) to[c + 1] = second;
      }
    }
    if (adds_rows && t == 0) arguments.sums[line] = row_sums[i / 2][i % 2 * 2];
  }
}

template <class Math, class Shape>
void launch_weight_gradient(WeightGradientArguments<typename Math::Storage> arguments, int splits, int groups,
                            Stream stream) {
  using T = typename Math::Storage;
  const auto tiles_of = [](int size, int tile) { return (size + tile - 1) / tile; };
  arguments.row_tiles = tiles_of(arguments.a.taps.channels, Shape::rows);
  arguments.column_tiles = tiles_of(arguments.columns, Shape::columns);
  const std::int64_t tiles = std::int64_t(arguments.row_tiles) * arguments.column_tiles;
  if (tiles > 0x7fffffff || groups > 65535) {
    throw std::runtime_error("weight_gradient: the weight has more tiles or groups than a grid of CUDA");
  }
  const dim3 grid{unsigned(tiles), unsigned(splits), unsigned(groups)};
  constexpr int shared = pipeline_bytes<T, Shape, false, false>;
  const Operand<T>& a = arguments.a;
  const Operand<T>& b = arguments.b;
  if constexpr (!std::is_same_v<Math, Plain>) {
    if (a.wide && b.wide && a.saved == nullptr && b.saved == nullptr) {
      return launch("weight_gradient", weight_gradient_kernel<Math, Shape, false>, grid, dim3(Shape::threads), shared,
                    stream, arguments);
    }
  }
  launch("weight_gradient", weight_gradient_kernel<Math, Shape, true>, grid, dim3(Shape::threads), shared, stream,
         arguments);
}

}  // namespace mrvae::cuda

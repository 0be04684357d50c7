// The kernel `convolve`, and its launch for one number type. See products.h.
//
// Rows of the product are results (n, a, b) of one phase, columns are output channels of a group, the reduction runs
// over taps and channels as one axis. Transposed, the results of one phase (p mod stride, q mod stride) share their
// taps: p = stride a + phase, and each tap reads h = a + constant, so that no product is spent on a tap that does
// not meet the input. Where stride and dilation have a common factor a phase may have no tap.
//
// Grid: tiles, phases, groups. Bytes: x about once for each column of tiles, weights once for each row of tiles, mostly
// from L2; y once, with a second tensor where the backward pass needs one.
#pragma once

#include "convolve_epilogue.cuh"

namespace mrvae::cuda {

// Of one axis: the taps of a phase are first, first + distance, ...
struct Axis {
  int kernel, stride, padding, dilation;
  int common, inverse;  // gcd(stride, dilation); 1 / (dilation / common) modulo stride / common
};

template <class T>
struct ConvolveArguments {
  Operand<T> x, weight;
  Result<T> to;
  Axis height, width;
  bool transposed, weight_columns;  // weights can be read in chunks of columns
  int column_tiles, row_tiles;
  std::int64_t x_group, saved_group, weight_group;
};

struct PhaseTaps {
  int first, distance, count, origin;
};

__device__ __forceinline__ PhaseTaps taps_of_phase(const Axis& axis, int phase) {
  const int position = phase + axis.padding, distance = axis.stride / axis.common;
  const int first = position / axis.common * axis.inverse % distance;
  const bool any = position % axis.common == 0 && first < axis.kernel;
  return {first, distance, any ? (axis.kernel - first + distance - 1) / distance : 0,
          (position - first * axis.dilation) / axis.stride};
}

// How operands are loaded: x as it is by asynchronous copies or through registers; weights in chunks of the reduction,
// in chunks of columns, or, with whatever strides, through registers.
enum class Weights { Depth, Columns, Any };

template <class Math, class Shape, bool staged, Weights weights>
__global__ void __launch_bounds__(Shape::threads, resident<Shape, staged>)
    convolve_kernel(const ConvolveArguments<typename Math::Storage> arguments) {
  using T = typename Math::Storage;
  constexpr int depth = depth_bytes / int(sizeof(T));
  constexpr bool b_inner = weights != Weights::Columns;
  constexpr int a_line = tile_line<T, true, Shape::rows>, b_line = tile_line<T, b_inner, Shape::columns>;
  const int group = int(blockIdx.z);
  const Pair phase = {int(blockIdx.y) / arguments.to.phases.w, int(blockIdx.y) % arguments.to.phases.w};
  int row, column;
  tile_of_block(int(blockIdx.x), arguments.row_tiles, arguments.column_tiles, row, column);
  row *= Shape::rows, column *= Shape::columns;

  Operand<T> x = arguments.x, weight = arguments.weight;
  x.data += group * arguments.x_group;
  if (x.saved != nullptr) x.saved += group * arguments.saved_group;
  if (x.gate != nullptr) x.gate += group * x.taps.channels;
  weight.data += group * arguments.weight_group;
  if (arguments.transposed) {
    const PhaseTaps h = taps_of_phase(arguments.height, phase.h), w = taps_of_phase(arguments.width, phase.w);
    x.positions.origin_h = h.origin, x.positions.origin_w = w.origin;
    x.taps.rows = weight.taps.rows = w.count > 0 ? h.count : 0;
    x.taps.across = weight.taps.across = w.count;
    weight.positions.origin_h = h.first, weight.positions.origin_w = w.first;
    weight.taps.step_h = h.distance, weight.taps.step_w = w.distance;
  }
  const int inner = x.taps.rows * x.taps.across * x.taps.channels, steps = (inner + depth - 1) / depth;

  float sums[Shape::M][Shape::N][4] = {}, row_sums[Shape::M][4];
  using A = std::conditional_t<staged, StagedLoader<T, Shape::threads, Shape::rows, depth, a_line, false>,
                               AsyncLoader<T, Shape::threads, Shape::rows, depth, a_line, false>>;
  using B = std::conditional_t<
      weights == Weights::Columns, ColumnLoader<T, Shape::threads, depth, Shape::columns, b_line>,
      std::conditional_t<weights == Weights::Depth,
                         AsyncLoader<T, Shape::threads, Shape::columns, depth, b_line, false>,
                         StagedLoader<T, Shape::threads, Shape::columns, depth, b_line, false>>>;
  if (steps > 0) {
    A a(x, row, 0);
    B b(weight, column, 0);
    multiply_block<Math, Shape, true, b_inner>(sums, row_sums, false, a, b, steps);
  }
  write_block<T, Shape>(arguments.to, sums, row, column, group, phase);
}

template <class Math, class Shape, bool staged, Weights weights>
void launch_convolve(ConvolveArguments<typename Math::Storage> arguments, int groups, Stream stream) {
  using T = typename Math::Storage;
  constexpr int loop = pipeline_bytes<T, Shape, true, weights != Weights::Columns>;
  constexpr int shared = loop > epilogue_bytes<T, Shape> ? loop : epilogue_bytes<T, Shape>;
  const Result<T>& to = arguments.to;
  arguments.row_tiles = (to.rows + Shape::rows - 1) / Shape::rows;
  arguments.column_tiles = (to.columns + Shape::columns - 1) / Shape::columns;
  const std::int64_t tiles = std::int64_t(arguments.row_tiles) * arguments.column_tiles;
  if (tiles > 0x7fffffff || groups > 65535 || to.phases.h * to.phases.w > 65535) {
    throw std::runtime_error("convolve: the result has more tiles, groups or phases than a grid of CUDA");
  }
  launch("convolve", convolve_kernel<Math, Shape, staged, weights>,
         dim3(unsigned(tiles), unsigned(to.phases.h * to.phases.w), unsigned(groups)), dim3(Shape::threads), shared,
         stream, arguments);
}

template <class Math, class Shape>
void launch_convolve(const ConvolveArguments<typename Math::Storage>& arguments, int groups, Stream stream) {
  if constexpr (std::is_same_v<Math, Plain>) {
    return launch_convolve<Math, Shape, true, Weights::Any>(arguments, groups, stream);
  } else {
    const bool staged = !arguments.x.wide || arguments.x.saved != nullptr || arguments.x.gate != nullptr;
    const Operand<typename Math::Storage>& weight = arguments.weight;
    if (weight.wide && staged) return launch_convolve<Math, Shape, true, Weights::Depth>(arguments, groups, stream);
    if (weight.wide) return launch_convolve<Math, Shape, false, Weights::Depth>(arguments, groups, stream);
    if (arguments.weight_columns && staged) {
      return launch_convolve<Math, Shape, true, Weights::Columns>(arguments, groups, stream);
    }
    if (arguments.weight_columns) {
      return launch_convolve<Math, Shape, false, Weights::Columns>(arguments, groups, stream);
    }
    launch_convolve<Math, Shape, true, Weights::Any>(arguments, groups, stream);
  }
}

}  // namespace mrvae::cuda

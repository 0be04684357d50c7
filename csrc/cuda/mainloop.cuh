// The loop of a matrix product: tiles of both operands pass through `stages` places in shared memory.
#pragma once

#include "fragments.cuh"
#include "loaders.cuh"

namespace mrvae::cuda {

// A block's tile of the result, and its warps' parts of it.
template <int rows_, int columns_, int warp_rows_, int warp_columns_, int stages_>
struct Tile {
  static constexpr int rows = rows_, columns = columns_, warp_rows = warp_rows_, warp_columns = warp_columns_;
  static constexpr int stages = stages_, across = columns / warp_columns;
  static constexpr int threads = rows / warp_rows * across * lanes;
  static constexpr int M = warp_rows / 16, N = warp_columns / 8;
};

using Large = Tile<128, 128, 64, 32, 4>;
using Medium = Tile<64, 64, 32, 32, 4>;
using Small = Tile<32, 32, 16, 16, 4>;

// Blocks that a processor holds at least: two of the largest need 128 registers a thread, in which only asynchronous
// copies leave room for the sums.
template <class Shape, bool staged>
constexpr int resident = !staged && Shape::threads == 256 ? 2 : 1;

// Numbers of one operand's tile in shared memory.
template <class T, bool depth_inner, int rows>
constexpr int tile_size = (depth_inner ? rows : depth_bytes / int(sizeof(T))) *
                          line<T, depth_inner, depth_inner ? depth_bytes / int(sizeof(T)) : rows>;

template <class T, bool depth_inner, int rows>
constexpr int tile_line = line<T, depth_inner, depth_inner ? depth_bytes / int(sizeof(T)) : rows>;

template <class T, class Shape, bool a_inner, bool b_inner>
constexpr int pipeline_bytes = Shape::stages * int(sizeof(T)) *
                               (tile_size<T, a_inner, Shape::rows> + tile_size<T, b_inner, Shape::columns>);

// sums of the block's tile, this warp's part; `row_sums` as in multiply_tiles. Shared memory may be reused afterwards.
template <class Math, class Shape, bool a_inner, bool b_inner, class A, class B>
__device__ __forceinline__ void multiply_block(float (&sums)[Shape::M][Shape::N][4], float (&row_sums)[Shape::M][4],
                                               bool add_rows, A& a, B& b, int steps) {
  using T = typename Math::Storage;
  constexpr int a_size = tile_size<T, a_inner, Shape::rows>, b_size = tile_size<T, b_inner, Shape::columns>;
  constexpr int a_line = tile_line<T, a_inner, Shape::rows>, b_line = tile_line<T, b_inner, Shape::columns>;
  constexpr int ahead = Shape::stages - 1;
  T* const shared = dynamic_shared<T>();
  const auto a_tile = [&](int stage) { return shared + stage * (a_size + b_size); };
  const auto b_tile = [&](int stage) { return shared + stage * (a_size + b_size) + a_size; };
  const int warp = int(threadIdx.x) / lanes;
  const int row = warp / Shape::across * Shape::warp_rows, column = warp % Shape::across * Shape::warp_columns;

#pragma unroll 1
  for (int stage = 0; stage < ahead; ++stage) {
    if (stage < steps) {
      a.begin(a_tile(stage)), b.begin(b_tile(stage));
      a.end(a_tile(stage)), b.end(b_tile(stage));
    }
    copy_async_commit();
  }
  int reading = 0, writing = ahead;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    // of the groups, one a stage, the oldest is this step's; after the barrier the tile of the step before is free
    copy_async_wait<ahead - 1>();
    __syncthreads();
    const bool more = step + ahead < steps;
    if (more) a.begin(a_tile(writing)), b.begin(b_tile(writing));
    copy_async_commit();
    multiply_tiles<Math, Shape::M, Shape::N, a_inner, b_inner, a_line, b_line>(sums, row_sums, add_rows,
                                                                            a_tile(reading), b_tile(reading), row,
                                                                            column);
    if (more) a.end(a_tile(writing)), b.end(b_tile(writing));
    reading = reading + 1 == Shape::stages ? 0 : reading + 1;
    writing = writing + 1 == Shape::stages ? 0 : writing + 1;
  }
  copy_async_wait<0>();
  __syncthreads();
}

// (row, column) of a tile: blocks next to each other share rows and columns, and so what L2 holds.
__device__ __forceinline__ void tile_of_block(int block, int row_tiles, int column_tiles, int& row, int& column) {
  const int together = 8 * column_tiles, first = block / together * 8;
  const int height = row_tiles - first < 8 ? row_tiles - first : 8;
  row = first + block % together % height;
  column = block % together / height;
}

}  // namespace mrvae::cuda

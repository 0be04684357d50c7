// Blocks whose threads take neighbouring channels, and go down the rows; see cut.cuh.
#pragma once

#include "packs.cuh"

namespace mrvae::cuda::memory {

// A thread's place in a cut by columns: rows [first, last) in steps of block_warps, from `column` on.
template <int V>
struct Place {
  std::int64_t sample, part, column, first, last;
  __device__ __forceinline__ Place(const Cut& cut, std::uint32_t block) {
    const std::uint32_t tile = block % std::uint32_t(cut.tiles), rest = block / std::uint32_t(cut.tiles);
    part = rest % std::uint32_t(cut.parts), sample = rest / std::uint32_t(cut.parts);
    column = (std::int64_t(tile) * lanes + threadIdx.x % lanes) * V;
    first = part * cut.block_rows + threadIdx.x / lanes;
    last = (part + 1) * cut.block_rows < cut.steps ? (part + 1) * cut.block_rows : cut.steps;
  }
};

template <bool plain, class T, int V>
__device__ __forceinline__ void column_constants(const Cut& cut, const EpilogueParameters<T>& with, bool wide,
                                                 std::int64_t sample, std::int64_t column, Constants<T, V>& out) {
  if (wide) {  // inner is 1, whole packs of channels
    const std::int64_t c = cut.by_channels.remainder(column), p = sample * cut.channels + c;
    read_values(with.gate + p, out.g, true);
    if (!plain && with.bias != nullptr) read_values(with.bias + c, out.b, true);
    if (!plain && with.shift != nullptr) read_values(with.shift + p, out.t, true);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const std::int64_t c = cut.by_channels.remainder(cut.by_inner.quotient(column + j)), p = sample * cut.channels + c;
    out.g[j] = with.gate[p];
    if (!plain && with.bias != nullptr) out.b[j] = with.bias[c];
    if (!plain && with.shift != nullptr) out.t[j] = with.shift[p];
  }
}

// Gate and shift of one pack, where each row has its own
template <class T, int V>
__device__ __forceinline__ void row_constants(const EpilogueParameters<T>& with, bool wide, std::int64_t at,
                                              std::int64_t end, Constants<T, V>& out) {
  if (at + V <= end) {
    read_values(with.gate + at, out.g, wide);
    if (with.shift != nullptr) read_values(with.shift + at, out.t, wide);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (at + j >= end) continue;
    out.g[j] = with.gate[at + j];
    if (with.shift != nullptr) out.t[j] = with.shift[at + j];
  }
}

template <bool plain, bool per_row, class S, int V>
__device__ __forceinline__ void forward_columns(const Cut& cut, std::uint32_t block, const S* u,
                                                const EpilogueParameters<Compute<S>>& with, bool wide, S* y) {
  using T = Compute<S>;
  const Place<V> place(cut, block);
  if (place.column >= cut.length) return;
  u += place.sample * cut.size;
  y += place.sample * cut.size;
  Constants<T, V> constants{};
  if constexpr (per_row) {
    if (with.bias != nullptr) {
#pragma unroll
      for (int j = 0; j < V; ++j) constants.b[j] = with.bias[cut.by_channels.remainder(place.column + j)];
    }
  } else {
    column_constants<plain>(cut, with, wide, place.sample, place.column, constants);
  }
  for (std::int64_t r = place.first; r < place.last; r += in_flight * block_warps) {
    Pack<S, V> packs[in_flight];
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t row = r + q * block_warps, at = row * cut.length + place.column;
      if (row < place.last && at + V <= cut.size) packs[q] = read<S, V>(u + at);
    }
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t row = r + q * block_warps, at = row * cut.length + place.column;
      if (row >= place.last || at + V > cut.size) continue;
      if constexpr (per_row) row_constants(with, wide, at, cut.size, constants);
      write(y + at, forward_pack<plain>(packs[q], constants, with.activation));
    }
  }
  if constexpr (V > 1) {
    // the last joined row may end within a pack
    const std::int64_t row = cut.steps - 1, at = row * cut.length + place.column;
    if (row < place.first || row >= place.last || (row - place.first) % block_warps != 0) return;
    if (at >= cut.size || at + V <= cut.size) return;
    Pack<S, V> pack{};
    if constexpr (per_row) row_constants(with, wide, at, cut.size, constants);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (at + j < cut.size) pack.values[j] = u[at + j];
    }
    pack = forward_pack<plain>(pack, constants, with.activation);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (at + j < cut.size) y[at + j] = pack.values[j];
    }
  }
}

// What the backward pass reads and writes. `u` and `du` may be nullptr where nobody asks for what needs them; du may be
// the memory of dy. Where each row has its own gate (per_row), dg and dt of every element go to row_gate and row_shift.
template <class S>
struct Backward {
  const S* dy;
  const S* u;
  S* du;
  Compute<S>* row_gate;
  Compute<S>* row_shift;
};

template <bool plain, bool per_row, class S, int V>
__device__ __forceinline__ void backward_columns(const Cut& cut, std::uint32_t block, Backward<S> data,
                                                 const EpilogueParameters<Compute<S>>& with, bool wide,
                                                 const Finish<Compute<S>>& finish) {
  using T = Compute<S>;
  // what the registers hold; where each row has its own gate, that and the shift are read along
  constexpr int batch = V < 8 ? (per_row ? 2 : in_flight) : (per_row ? 1 : plain ? in_flight : 2);
  const Place<V> place(cut, block);
  const bool inside = place.column < cut.length;
  const std::int64_t start = place.sample * cut.size;
  Constants<T, V> constants{};
  if (inside) {
    if constexpr (per_row) {
      if (with.bias != nullptr) {
#pragma unroll
        for (int j = 0; j < V; ++j) constants.b[j] = with.bias[cut.by_channels.remainder(place.column + j)];
      }
    } else {
      column_constants<plain>(cut, with, wide, place.sample, place.column, constants);
    }
  }
  T sum[V] = {}, dot[V] = {};
  constexpr int part = V < 4 ? V : 4;
  const auto add = [&](int j, T dz, T product) {
    if constexpr (per_row) {
      sum[j] += constants.g[j] * dz;
    } else {
      sum[j] += dz;
      dot[j] += product;
    }
  };
  for (std::int64_t r = inside ? place.first : place.last; r < place.last; r += batch * block_warps) {
    Pack<S, V> dy[batch], u[batch];
#pragma unroll
    for (int q = 0; q < batch; ++q) {
      const std::int64_t row = r + q * block_warps, at = row * cut.length + place.column;
      if (row >= place.last || at + V > cut.size) continue;
      dy[q] = read<S, V>(data.dy + start + at);
      if (data.u != nullptr) u[q] = read<S, V>(data.u + start + at);
      if (data.u == nullptr) u[q] = Pack<S, V>{};
    }
#pragma unroll
    for (int q = 0; q < batch; ++q) {
      const std::int64_t row = r + q * block_warps, at = row * cut.length + place.column;
      if (row >= place.last || at + V > cut.size) continue;
      if constexpr (per_row) row_constants(with, wide, at, cut.size, constants);
      const auto each = [&](int j, const T(&dz)[part], const T(&product)[part]) {
        if (per_row && data.row_gate != nullptr) {
          write_values(data.row_gate + at + j, product, wide);
          write_values(data.row_shift + at + j, dz, wide);
        }
#pragma unroll
        for (int k = 0; k < part; ++k) add(j + k, dz[k], product[k]);
      };
      const Pack<S, V> du = backward_pack<plain>(dy[q], u[q], constants, with.activation, each);
      if (data.du != nullptr) write(data.du + start + at, du);
    }
  }
  if constexpr (V > 1) {
    const std::int64_t row = cut.steps - 1, at = row * cut.length + place.column;
    const bool mine = inside && row >= place.first && row < place.last && (row - place.first) % block_warps == 0;
    if (mine && at < cut.size && at + V > cut.size) {
      Pack<S, V> dy{}, u{};
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (at + j < cut.size) dy.values[j] = data.dy[start + at + j];
        if (at + j < cut.size && data.u != nullptr) u.values[j] = data.u[start + at + j];
      }
      if constexpr (per_row) row_constants(with, wide, at, cut.size, constants);
      const auto each = [&](int j, const T(&dz)[part], const T(&product)[part]) {
#pragma unroll
        for (int k = 0; k < part; ++k) {
          if (at + j + k >= cut.size) continue;
          if (per_row && data.row_gate != nullptr) {
            data.row_gate[at + j + k] = product[k];
            data.row_shift[at + j + k] = dz[k];
          }
          add(j + k, dz[k], product[k]);
        }
      };
      const Pack<S, V> du = backward_pack<plain>(dy, u, constants, with.activation, each);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (data.du != nullptr && at + j < cut.size) data.du[start + at + j] = du.values[j];
      }
    }
  }
  if (!finish.wanted()) return;
  __shared__ T sums[block_threads * V], dots[block_threads * V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    sums[threadIdx.x * V + j] = sum[j];
    dots[threadIdx.x * V + j] = dot[j];
  }
  __syncthreads();
  const std::int64_t left = place.column - std::int64_t(threadIdx.x % lanes) * V;  // of the block
  for (int i = int(threadIdx.x); i < lanes * V && left + i < cut.length; i += block_threads) {
    T s = 0, d = 0;
#pragma unroll
    for (int k = 0; k < block_warps; ++k) {
      s += sums[k * lanes * V + i];
      d += dots[k * lanes * V + i];
    }
    finish.write((place.sample * cut.parts + place.part) * cut.length + left + i, s, d);
  }
}

}  // namespace mrvae::cuda::memory

// How a tensor of samples, rows, channels and inner elements is cut into blocks, and the loops over a block's part: what
// the epilogue and the fold share.
//
//   columns   inner is 1 or short. A warp covers 32 packs of 16 bytes along a row, whose parameters stay in registers;
//             the block's 8 warps go down the rows. Rows are joined until a joined row is whole packs and fills the warp,
//             so that any number of channels is read in packs.
//   planes    inner is long. A group of up to 32 lanes takes one channel's run, or a segment of a long one.
//
// Each thread starts 4 packs before it uses the first, of dy and of u each. Packs that lie across the end of what a
// thread may touch are handled element by element.
#pragma once

#include <algorithm>
#include <numeric>

#include "../kernels.h"
#include "runtime.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

// Numbers below it are divided by multiplication, the rest by 64-bit division. Tests set it low.
#ifndef MRVAE_NARROW
#define MRVAE_NARROW (std::int64_t(1) << 31)
#endif

namespace mrvae::cuda::memory {

constexpr int block_threads = 256, block_warps = block_threads / lanes;
constexpr int in_flight = 4;  // packs that a thread loads at a time

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class S>
constexpr int pack_size = 16 / int(sizeof(S));

inline bool aligned(std::initializer_list<const void*> pointers) {
  std::uintptr_t bits = 0;
  for (const void* pointer : pointers) bits |= reinterpret_cast<std::uintptr_t>(pointer);
  return bits % 16 == 0;
}

constexpr std::int64_t quotient_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// ---- division by a number that is the same for all threads --------------------------------------------------------

// n / d = (n * magic / 2^32 + n) / 2^shift for n < 2^31: Granlund and Montgomery, 1994.
struct Divider {
  std::uint64_t divisor = 1;
  std::uint32_t magic = 1, shift = 0;
  static constexpr std::uint32_t wide = 64;

  Divider() = default;
  Divider(std::int64_t d, std::int64_t largest) : divisor(std::uint64_t(std::max<std::int64_t>(1, d))) {
    if (largest >= MRVAE_NARROW || d >= MRVAE_NARROW) {
      shift = wide;
      return;
    }
    while ((std::uint64_t(1) << shift) < divisor) ++shift;
    magic = std::uint32_t(((std::uint64_t(1) << 32) * ((std::uint64_t(1) << shift) - divisor)) / divisor + 1);
  }

  MRVAE_HOST_DEVICE std::int64_t quotient(std::int64_t n) const {
    if (shift == wide) return std::int64_t(std::uint64_t(n) / divisor);
    const std::uint32_t narrow = std::uint32_t(n);
    return ((std::uint32_t(std::uint64_t(narrow) * magic >> 32)) + narrow) >> shift;
  }
  MRVAE_HOST_DEVICE std::int64_t remainder(std::int64_t n) const { return n - quotient(n) * std::int64_t(divisor); }
};

// ---- where sums go ------------------------------------------------------------------------------------------------

// Number i of the sums of dz and of dz (u + b), which go to partial results or are final. Any target may be nullptr.
template <class T>
struct Finish {
  T* sum;
  T* dot;           // + left[i] * right[i], unless one of them is nullptr
  T* scaled;        // scale[i] * sum
  const T* scale;
  const T* left;
  const T* right;

  MRVAE_HOST_DEVICE bool wanted() const { return sum != nullptr || dot != nullptr || scaled != nullptr; }
  __device__ __forceinline__ void write(std::int64_t i, T of_dz, T of_product) const {
    if (sum != nullptr) sum[i] = of_dz;
    if (dot != nullptr) dot[i] = left != nullptr && right != nullptr ? of_product + left[i] * right[i] : of_product;
    if (scaled != nullptr) scaled[i] = scale[i] * of_dz;
  }
};

// ---- the cut ------------------------------------------------------------------------------------------------------

struct Cut {
  std::int64_t rows, channels, inner;
  std::int64_t size;        // elements a sample
  std::int64_t length;      // columns: elements a joined row; planes: elements a segment
  std::int64_t steps;       // columns: joined rows a sample; planes: segments in all
  std::int64_t block_rows;  // columns: joined rows a block
  std::int32_t parts;       // columns: blocks down the joined rows; planes: segments a plane
  std::int32_t tiles;       // columns: blocks across a joined row
  std::int32_t group;       // planes: log2 of the lanes a segment; -1 for columns
  bool packed;              // 16-byte packs, or single elements
  std::uint32_t blocks;
  Divider by_inner, by_channels, by_rows, by_parts;

  bool columns() const { return group < 0; }
};

// What the sums of a cut look like before the second stage: (samples, rows, channels, inner).
inline EpilogueShape partial_shape(const EpilogueShape& shape, const Cut& cut) {
  if (!cut.columns()) return {shape.samples, shape.rows, shape.channels, cut.parts};
  const std::int64_t row = shape.channels * shape.inner;
  return {shape.samples, cut.parts * (cut.length / row), shape.channels, shape.inner};
}

inline bool is_final(const EpilogueShape& partial) { return partial.rows == 1 && partial.inner == 1; }

inline bool use_columns(const EpilogueShape& s) { return s.inner == 1 || (s.inner < 256 && s.rows >= block_warps); }

// Packs need aligned pointers, and columns a sample that is whole packs.
inline bool use_packs(const EpilogueShape& s, int pack, bool pointers_aligned) {
  return pointers_aligned && (!use_columns(s) || s.samples == 1 || s.rows * s.channels * s.inner % pack == 0);
}

// Of a shape with at least one element. `sums`: there is a second stage, which fewer blocks make shorter.
inline Cut cut_of(const EpilogueShape& s, int pack, bool sums) {
  Cut cut{};
  cut.rows = s.rows, cut.channels = s.channels, cut.inner = s.inner;
  const std::int64_t row = s.channels * s.inner;
  cut.size = s.rows * row;
  cut.packed = pack > 1;
  cut.by_rows = Divider(s.rows, s.samples * s.rows);
  if (use_columns(s)) {
    cut.group = -1;
    const std::int64_t width = lanes * pack, unit = pack / std::gcd(std::int64_t(pack), row);
    std::int64_t join = quotient_up(width, row * unit) * unit;
    const bool one_stage = sums && unit == 1 && s.inner == 1 && s.rows <= 256;
    if (one_stage) join = 1;
    join = std::min(join, quotient_up(s.rows, unit) * unit);
    if (!one_stage && s.rows >= 64 * join) {
      // a few rows more where that leaves fewer lanes idle
      const auto used = [&](std::int64_t k) { return double(k * row) / double(quotient_up(k * row, width) * width); };
      std::int64_t best = join;
      for (std::int64_t k = join; k <= 8 * join; k += join) {
        if (used(k) > used(best) + 0.05) best = k;
      }
      join = best;
    }
    cut.length = join * row;
    cut.steps = quotient_up(s.rows, join);
    cut.tiles = std::int32_t(quotient_up(cut.length, width));
    const std::int64_t share = quotient_up(cut.steps * s.samples * cut.tiles, sums ? 1024 : 4096);
    cut.block_rows = one_stage ? s.rows : std::max<std::int64_t>(sums ? 64 : in_flight * block_warps, share);
    cut.parts = std::int32_t(quotient_up(cut.steps, cut.block_rows));
    cut.by_inner = Divider(s.inner, cut.length);
    cut.by_channels = Divider(s.channels, cut.length);
    cut.blocks = std::uint32_t(s.samples * cut.parts * cut.tiles);
    return cut;
  }
  const std::int64_t planes = s.samples * s.rows * s.channels, packs = quotient_up(s.inner, pack);
  std::int64_t segment = sums ? 512 : 256;  // packs
  if (sums && planes * quotient_up(packs, segment) > 4096) segment = 2048;
  cut.parts = std::int32_t(quotient_up(packs, segment));
  segment = quotient_up(packs, cut.parts);
  cut.length = segment * pack;
  cut.steps = planes * cut.parts;
  // four packs a lane where that leaves groups of eight, so that a group reads 128 bytes in a row
  while (cut.group < 5 && (std::int64_t(cut.group < 3 ? 1 : 4) << cut.group) < segment) ++cut.group;
  cut.by_parts = Divider(cut.parts, cut.steps);
  cut.by_channels = Divider(s.channels, planes);
  cut.blocks = std::uint32_t(quotient_up(cut.steps << cut.group, block_threads));
  return cut;
}

// The larger of the partial sums of both ways to access, packs and single elements.
inline std::int64_t partial_size(const EpilogueShape& s, int pack) {
  std::int64_t most = 0;
  for (const int width : {pack, 1}) {
    const EpilogueShape p = partial_shape(s, cut_of(s, width, true));
    if (!is_final(p)) most = std::max(most, p.samples * p.rows * p.channels * p.inner);
  }
  return most;
}

// ---- packs --------------------------------------------------------------------------------------------------------

template <class S, int V>
__device__ __forceinline__ Pack<S, V> read(const S* from) {
  return *reinterpret_cast<const Pack<S, V>*>(from);
}

template <class S, int V>
__device__ __forceinline__ void write(S* to, const Pack<S, V>& pack) {
  *reinterpret_cast<Pack<S, V>*>(to) = pack;
}

// V parameters in a row; 16 bytes at a time where the pointer is aligned
template <class T, int V>
__device__ __forceinline__ void read_values(const T* from, T (&values)[V], bool wide) {
  constexpr int step = V % pack_size<T> == 0 ? pack_size<T> : 1;
  if (step > 1 && wide) {
#pragma unroll
    for (int j = 0; j < V; j += step) {
      const Pack<T, step> pack = read<T, step>(from + j);
#pragma unroll
      for (int k = 0; k < step; ++k) values[j + k] = pack.values[k];
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) values[j] = from[j];
  }
}

template <class T, int V>
__device__ __forceinline__ void write_values(T* to, const T (&values)[V], bool wide) {
  constexpr int step = V % pack_size<T> == 0 ? pack_size<T> : 1;
  if (step > 1 && wide) {
#pragma unroll
    for (int j = 0; j < V; j += step) {
      Pack<T, step> pack;
#pragma unroll
      for (int k = 0; k < step; ++k) pack.values[k] = values[j + k];
      write<T, step>(to + j, pack);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) to[j] = values[j];
  }
}

// The numbers rounded to storage; on a GPU two 16-bit ones in one instruction.
template <class S, class T, int V>
__device__ __forceinline__ Pack<S, V> rounded(const T (&values)[V]) {
  Pack<S, V> pack;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) == 2 && V % 2 == 0) {
#pragma unroll
    for (int j = 0; j < V; j += 2) {
      if constexpr (std::is_same_v<S, Half>) {
        const __half2 pair = __floats2half2_rn(values[j], values[j + 1]);
        std::memcpy(pack.values + j, &pair, 4);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[j], values[j + 1]);
        std::memcpy(pack.values + j, &pair, 4);
      }
    }
    return pack;
  }
#endif
#pragma unroll
  for (int j = 0; j < V; ++j) store(pack.values[j], values[j]);
  return pack;
}

// ---- the mathematics of a pack ------------------------------------------------------------------------------------

// g, b and t: of each element of a pack, or with n = 1 of all of them
template <class T, int n>
struct Constants {
  T g[n], b[n], t[n];
};

template <Activation kind, class T, int V>
__device__ __forceinline__ void activate_each(T (&z)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) z[j] = activate<kind>(z[j]);
}

template <Activation kind, class T, int V>
__device__ __forceinline__ void slope_each(T (&z)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) z[j] = activation_slope<kind>(z[j]);
}

// One branch a pack, which all threads take: a template parameter would make seven times as many kernels.
template <class T, int V>
__device__ __forceinline__ void activate_all(T (&z)[V], Activation activation) {
  switch (activation) {
    case Activation::None: break;
    case Activation::Relu: activate_each<Activation::Relu>(z); break;
    case Activation::Silu: activate_each<Activation::Silu>(z); break;
    case Activation::Gelu: activate_each<Activation::Gelu>(z); break;
    case Activation::Tanh: activate_each<Activation::Tanh>(z); break;
    case Activation::LeakyRelu: activate_each<Activation::LeakyRelu>(z); break;
    case Activation::Elu: activate_each<Activation::Elu>(z); break;
  }
}

template <class T, int V>
__device__ __forceinline__ void slope_all(T (&z)[V], Activation activation) {
  switch (activation) {
    case Activation::None: slope_each<Activation::None>(z); break;
    case Activation::Relu: slope_each<Activation::Relu>(z); break;
    case Activation::Silu: slope_each<Activation::Silu>(z); break;
    case Activation::Gelu: slope_each<Activation::Gelu>(z); break;
    case Activation::Tanh: slope_each<Activation::Tanh>(z); break;
    case Activation::LeakyRelu: slope_each<Activation::LeakyRelu>(z); break;
    case Activation::Elu: slope_each<Activation::Elu>(z); break;
  }
}

// `plain`: y = g u, without bias, shift and activation, as the fold needs it
template <bool plain, class S, int V, class T, int n>
__device__ __forceinline__ Pack<S, V> forward_pack(const Pack<S, V>& u, const Constants<T, n>& with,
                                                   Activation activation) {
  T z[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const int k = n == 1 ? 0 : j;
    z[j] = plain ? with.g[k] * load(u.values[j]) : with.g[k] * (load(u.values[j]) + with.b[k]) + with.t[k];
  }
  if constexpr (!plain) activate_all(z, activation);
  return rounded<S>(z);
}

// Returns du, and calls each(j, dz, product) with dz and dz (u + b) of elements j and next ones: four at a time, as the
// registers do not hold more.
template <bool plain, class S, int V, class T, int n, class Each>
__device__ __forceinline__ Pack<S, V> backward_pack(const Pack<S, V>& dy, const Pack<S, V>& u,
                                                    const Constants<T, n>& with, Activation activation,
                                                    const Each& each) {
  constexpr int part = V < 4 ? V : 4;
  Pack<S, V> result;
#pragma unroll
  for (int first = 0; first < V; first += part) {
    T dz[part], product[part], du[part];
#pragma unroll
    for (int j = 0; j < part; ++j) {
      const int k = n == 1 ? 0 : first + j;
      product[j] = plain ? load(u.values[first + j]) : load(u.values[first + j]) + with.b[k];
      if constexpr (!plain) dz[j] = with.g[k] * product[j] + with.t[k];
    }
    if constexpr (!plain) slope_all(dz, activation);
#pragma unroll
    for (int j = 0; j < part; ++j) {
      dz[j] = plain ? load(dy.values[first + j]) : load(dy.values[first + j]) * dz[j];
      product[j] *= dz[j];
      du[j] = with.g[n == 1 ? 0 : first + j] * dz[j];
    }
    const Pack<S, part> some = rounded<S>(du);
#pragma unroll
    for (int j = 0; j < part; ++j) result.values[first + j] = some.values[j];
    each(first, dz, product);
  }
  return result;
}

// ---- columns ------------------------------------------------------------------------------------------------------

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

// ---- planes -------------------------------------------------------------------------------------------------------

// A lane's place in a cut by planes: elements [begin, end) of its group, in packs [first, last).
template <int V>
struct Segment {
  std::int64_t index, begin, end, first, last, channel, parameter;
  int lane, size;
  bool exists;
  __device__ __forceinline__ Segment(const Cut& cut, std::uint32_t block) {
    const std::int64_t thread = std::int64_t(block) * block_threads + threadIdx.x;
    size = 1 << cut.group;
    lane = int(threadIdx.x) & (size - 1);
    index = thread >> cut.group;
    exists = index < cut.steps;
    if (!exists) index = 0;
    const std::int64_t plane = cut.by_parts.quotient(index), row = cut.by_channels.quotient(plane);
    channel = plane - row * cut.channels;
    parameter = cut.by_rows.quotient(row) * cut.channels + channel;
    begin = plane * cut.inner + (index - plane * cut.parts) * cut.length;
    const std::int64_t stop = (plane + 1) * cut.inner;
    end = begin + cut.length < stop ? begin + cut.length : stop;
    first = begin / V;
    last = exists ? (end + V - 1) / V : first;
  }
  __device__ __forceinline__ bool whole(std::int64_t pack) const { return pack * V >= begin && (pack + 1) * V <= end; }
  // The first and the last pack may be shared with neighbours: one lane each takes them. -1: nothing to do
  __device__ __forceinline__ std::int64_t shared_pack(int side) const {
    const std::int64_t pack = side == 0 ? first : last - 1;
    if (!exists || (side == 1 && pack == first) || lane != (side == 0 ? 0 : size - 1) || whole(pack)) return -1;
    return pack;
  }
};

template <bool plain, class T>
__device__ __forceinline__ Constants<T, 1> plane_constants(const EpilogueParameters<T>& with, std::int64_t channel,
                                                           std::int64_t parameter) {
  Constants<T, 1> out{};
  out.g[0] = with.gate[parameter];
  if (!plain && with.bias != nullptr) out.b[0] = with.bias[channel];
  if (!plain && with.shift != nullptr) out.t[0] = with.shift[parameter];
  return out;
}

template <bool plain, class S, int V>
__device__ __forceinline__ void forward_planes(const Cut& cut, std::uint32_t block, const S* u,
                                               const EpilogueParameters<Compute<S>>& with, S* y) {
  const Segment<V> segment(cut, block);
  if (!segment.exists) return;
  const Constants<Compute<S>, 1> constants = plane_constants<plain>(with, segment.channel, segment.parameter);
  for (std::int64_t k = segment.first + segment.lane; k < segment.last; k += in_flight * segment.size) {
    Pack<S, V> packs[in_flight];
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t pack = k + q * segment.size;
      if (pack < segment.last && segment.whole(pack)) packs[q] = read<S, V>(u + pack * V);
    }
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t pack = k + q * segment.size;
      if (pack >= segment.last || !segment.whole(pack)) continue;
      write(y + pack * V, forward_pack<plain>(packs[q], constants, with.activation));
    }
  }
  if constexpr (V > 1) {
    for (int side = 0; side < 2; ++side) {
      const std::int64_t pack = segment.shared_pack(side);
      if (pack < 0) continue;
      for (int j = 0; j < V; ++j) {
        const std::int64_t at = pack * V + j;
        if (at < segment.begin || at >= segment.end) continue;
        write(y + at, forward_pack<plain>(read<S, 1>(u + at), constants, with.activation));
      }
    }
  }
}

template <bool plain, class S, int V>
__device__ __forceinline__ void backward_planes(const Cut& cut, std::uint32_t block, Backward<S> data,
                                                const EpilogueParameters<Compute<S>>& with,
                                                const Finish<Compute<S>>& finish) {
  using T = Compute<S>;
  const Segment<V> segment(cut, block);
  const Constants<T, 1> constants = plane_constants<plain>(with, segment.channel, segment.parameter);
  T sum = 0, dot = 0;
  const auto add = [&](int, const auto& dz, const auto& product) {
#pragma unroll
    for (std::size_t j = 0; j < sizeof dz / sizeof(T); ++j) {
      sum += dz[j];
      dot += product[j];
    }
  };
  for (std::int64_t k = segment.first + segment.lane; k < segment.last; k += in_flight * segment.size) {
    Pack<S, V> dy[in_flight], u[in_flight];
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t pack = k + q * segment.size;
      if (pack >= segment.last || !segment.whole(pack)) continue;
      dy[q] = read<S, V>(data.dy + pack * V);
      if (data.u != nullptr) u[q] = read<S, V>(data.u + pack * V);
      if (data.u == nullptr) u[q] = Pack<S, V>{};
    }
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t pack = k + q * segment.size;
      if (pack >= segment.last || !segment.whole(pack)) continue;
      const Pack<S, V> du = backward_pack<plain>(dy[q], u[q], constants, with.activation, add);
      if (data.du != nullptr) write(data.du + pack * V, du);
    }
  }
  if constexpr (V > 1) {
    for (int side = 0; side < 2; ++side) {
      const std::int64_t pack = segment.shared_pack(side);
      if (pack < 0) continue;
      for (int j = 0; j < V; ++j) {
        const std::int64_t at = pack * V + j;
        if (at < segment.begin || at >= segment.end) continue;
        const Pack<S, 1> u = data.u != nullptr ? read<S, 1>(data.u + at) : Pack<S, 1>{};
        const Pack<S, 1> dy = read<S, 1>(data.dy + at);
        const Pack<S, 1> du = backward_pack<plain>(dy, u, constants, with.activation, add);
        if (data.du != nullptr) write(data.du + at, du);
      }
    }
  }
  if (!finish.wanted()) return;
  for (int distance = segment.size / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(all_lanes, sum, distance);
    dot += __shfl_xor_sync(all_lanes, dot, distance);
  }
  if (segment.exists && segment.lane == 0) finish.write(segment.index, sum, dot);
}

}  // namespace mrvae::cuda::memory

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

}  // namespace mrvae::cuda::memory

// An operand of a product as loaders read it.
//
// Activations, gradients and weights are read alike: some positions (n, h, w) by some numbers of the axis of (tap,
// channel), which is one axis, so that nothing but its end is padded to whole tiles. Tap (i, j) of a position is at
// (h + i step_h, w + j step_w), zero outside of the image.
#pragma once

#include "slopes.cuh"
#include "tensor_core.h"

namespace mrvae::cuda {

// Division of 0 <= n < 2^31 by a number that the host knows.
struct Divider {
  std::uint32_t by = 1, magic = 1, shift = 0;

  Divider() = default;
  explicit Divider(std::int64_t divisor) : by(std::uint32_t(divisor > 0 ? divisor : 1)) {
    while ((std::uint64_t(1) << shift) < by) ++shift;
    magic = std::uint32_t(((std::uint64_t(1) << 32) * ((std::uint64_t(1) << shift) - by)) / by + 1);
  }
  __device__ __forceinline__ int quotient(int n) const {
    const auto high = std::uint32_t((std::uint64_t(std::uint32_t(n)) * magic) >> 32);
    return int((high + std::uint32_t(n)) >> shift);
  }
};

// Strides in elements.
struct Steps {
  std::int64_t n, c, h, w;
};

// The axis of taps and channels.
struct Taps {
  int rows, across, channels, step_h, step_w;
};

struct Tap {
  int i, j, c;
};

__device__ __forceinline__ Tap tap_at(int number, const Taps& taps) {
  const int channels = taps.channels > 0 ? taps.channels : 1, across = taps.across > 0 ? taps.across : 1;
  const int tap = number / channels;
  return {tap / across, tap % across, number - tap * channels};
}

__device__ __forceinline__ void advance(Tap& tap, const Taps& taps, int by) {
  tap.c += by;
  while (tap.c >= taps.channels) {
    tap.c -= taps.channels;
    if (++tap.j == taps.across) {
      tap.j = 0;
      ++tap.i;
    }
  }
}

// The axis of positions: number = (n lines + p) across + q is sample n at (p step_h + origin_h, q step_w + origin_w).
struct Positions {
  Divider span, across;  // lines x across, across
  int end, step_h, step_w, origin_h, origin_w;
};

struct Place {
  std::int64_t at, saved_at;
  int h, w;
};

constexpr int nowhere = -(1 << 30);  // an h outside of every image

// What one operand is: data and, for the prologue, the activation's result or argument.
template <class T>
struct Operand {
  const T *data, *saved;
  Steps steps, saved_steps;
  int height, width;
  Taps taps;
  Positions positions;
  const float* gate;  // of the prologue, by channel
  Activation activation;
  bool wide;             // chunks are 16 aligned bytes, and no chunk has numbers of two taps
  bool positions_inner;  // neighbouring positions are neighbours in memory
};

template <class T>
__device__ __forceinline__ Place place_of(const Operand<T>& from, int number) {
  if (number >= from.positions.end) return {0, 0, nowhere, 0};
  int n = number, p = 0, q = 0;
  if (from.positions.span.by != 1) {
    n = from.positions.span.quotient(number), q = number - n * int(from.positions.span.by);
    p = from.positions.across.quotient(q), q -= p * int(from.positions.across.by);
  }
  const int h = p * from.positions.step_h + from.positions.origin_h;
  const int w = q * from.positions.step_w + from.positions.origin_w;
  const auto offset = [&](const Steps& steps) { return n * steps.n + h * steps.h + w * steps.w; };
  return {offset(from.steps), from.saved != nullptr ? offset(from.saved_steps) : 0, h, w};
}

// Whether the tap meets the image, and its distance from the place it belongs to.
template <class T>
__device__ __forceinline__ bool inside(const Operand<T>& from, const Place& place, const Tap& tap) {
  return tap.i < from.taps.rows && unsigned(place.h + tap.i * from.taps.step_h) < unsigned(from.height) &&
         unsigned(place.w + tap.j * from.taps.step_w) < unsigned(from.width);
}

__device__ __forceinline__ std::int64_t distance(const Taps& taps, const Steps& steps, const Tap& tap) {
  return tap.i * taps.step_h * steps.h + tap.j * taps.step_w * steps.w + tap.c * steps.c;
}

// 16 bytes of numbers, in registers.
template <class T>
struct Chunk {
  static constexpr int count = 16 / int(sizeof(T));
  std::uint32_t word[4] = {0, 0, 0, 0};

  __device__ __forceinline__ float get(int v) const {
    if constexpr (sizeof(T) == 4) {
      return storage::as_float(word[v]);
    } else {
      return load(T{std::uint16_t(word[v / 2] >> (16 * (v % 2)))});
    }
  }
  __device__ __forceinline__ void put(int v, T value) {
    if constexpr (sizeof(T) == 4) {
      word[v] = storage::as_bits(value);
    } else {
      word[v / 2] |= std::uint32_t(value.bits) << (16 * (v % 2));  // the word is zero before
    }
  }
};

// The chunk at data + at, of a tap of the place that meets the image or does not; `first` is the place's own address.
template <class T>
__device__ __forceinline__ Chunk<T> read_chunk(const T* data, std::int64_t at, std::int64_t first, const Steps& steps,
                                               const Operand<T>& from, const Place& place, Tap tap, bool meets) {
  Chunk<T> chunk;
  if (from.wide) {
    if (meets) {
      const uint4 words = *reinterpret_cast<const uint4*>(data + at);
      chunk.word[0] = words.x, chunk.word[1] = words.y, chunk.word[2] = words.z, chunk.word[3] = words.w;
    }
  } else if (tap.c + Chunk<T>::count <= from.taps.channels) {
    if (meets) {
#pragma unroll
      for (int v = 0; v < Chunk<T>::count; ++v) chunk.put(v, data[at + v * steps.c]);
    }
  } else {
#pragma unroll
    for (int v = 0; v < Chunk<T>::count; ++v) {
      if (inside(from, place, tap)) chunk.put(v, data[first + distance(from.taps, steps, tap)]);
      advance(tap, from.taps, 1);
    }
  }
  return chunk;
}

}  // namespace mrvae::cuda

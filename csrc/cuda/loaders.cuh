// Loaders bring tiles of operands into shared memory, 16 bytes of channels ("chunk") a time.
//
// begin(tile) starts the loads of the next tile, and end(tile), after a product has hidden their latency, completes
// them: it does nothing where copies are asynchronous, else it applies the prologue and stores.
#pragma once

#include "operands.cuh"

namespace mrvae::cuda {

// A tile of `positions` lines with `channels` numbers of the axis of taps and channels. Steps along the positions, or
// along the other axis, where addresses and bounds are worked out anew only as the tap changes.
template <class T, int threads, int positions, int channels, int stride, bool along_positions>
struct Grid {
  static constexpr int width = 16 / int(sizeof(T)), columns = channels / width, pass = threads / columns;
  static constexpr int count = positions / pass;  // chunks of a thread, one below the other
  static_assert(threads % columns == 0 && positions % pass == 0);

  const Operand<T>& from;
  int position, column;  // in the tile, of the first chunk
  int first;             // position of the tile's first line
  Tap tap;
  std::int64_t beyond, saved_beyond;  // the tap's address, less its place's
  unsigned meets;                     // bit i: chunk i's tap meets the image
  Place places[along_positions ? 1 : count];

  __device__ __forceinline__ Grid(const Operand<T>& operand, int first_position, int first_number)
      : from(operand), first(first_position) {
    const int thread = int(threadIdx.x);
    position = operand.positions_inner ? thread % pass : thread / columns;
    column = operand.positions_inner ? thread / pass : thread % columns;
    tap = tap_at(first_number + column * width, operand.taps);
    if constexpr (!along_positions) {
#pragma unroll
      for (int i = 0; i < count; ++i) places[i] = place_of(from, first + position + i * pass);
    }
    settle();
  }
  __device__ __forceinline__ void settle() {
    beyond = distance(from.taps, from.steps, tap);
    saved_beyond = from.saved != nullptr ? distance(from.taps, from.saved_steps, tap) : 0;
    meets = 0;
    if constexpr (!along_positions) {
#pragma unroll
      for (int i = 0; i < count; ++i) meets |= inside(from, places[i], tap) ? 1u << i : 0u;
    }
  }
  __device__ __forceinline__ Place place(int i) const {
    if constexpr (along_positions) {
      return place_of(from, first + position + i * pass);
    } else {
      return places[i];
    }
  }
  __device__ __forceinline__ bool meets_image(int i, const Place& place) const {
    if constexpr (along_positions) {
      return inside(from, place, tap);
    } else {
      return (meets >> i & 1u) != 0;
    }
  }
  __device__ __forceinline__ void next() {
    if constexpr (along_positions) {
      first += positions;
    } else {
      tap.c += channels;
      if (tap.c < from.taps.channels) {
        beyond += channels * from.steps.c, saved_beyond += channels * from.saved_steps.c;
      } else {
        advance(tap, from.taps, 0);
        settle();
      }
    }
  }
  __device__ __forceinline__ T* target(T* tile, int i) const {
    return tile + (position + i * pass) * stride + column * width;
  }
};

template <class T, int threads, int positions, int channels, int stride, bool along_positions>
struct AsyncLoader : Grid<T, threads, positions, channels, stride, along_positions> {
  using Base = Grid<T, threads, positions, channels, stride, along_positions>;
  using Base::Base;

  __device__ __forceinline__ void begin(T* tile) {
#pragma unroll
    for (int i = 0; i < Base::count; ++i) {
      const Place place = this->place(i);
      const bool valid = this->meets_image(i, place);
      copy_async<16>(this->target(tile, i), this->from.data + (valid ? place.at + this->beyond : 0), valid);
    }
    this->next();
  }
  __device__ __forceinline__ void end(T*) {}
};

template <class T, int threads, int positions, int channels, int stride, bool along_positions>
struct StagedLoader : Grid<T, threads, positions, channels, stride, along_positions> {
  using Base = Grid<T, threads, positions, channels, stride, along_positions>;
  using Base::Base;
  Chunk<T> chunks[Base::count], saved[Base::count];
  Tap loaded;

  __device__ __forceinline__ void begin(T*) {
    loaded = this->tap;
#pragma unroll
    for (int i = 0; i < Base::count; ++i) {
      const Place place = this->place(i);
      const bool meets = this->meets_image(i, place);
      chunks[i] = read_chunk(this->from.data, place.at + this->beyond, place.at, this->from.steps, this->from, place,
                             loaded, meets);
      if (this->from.saved != nullptr) {
        saved[i] = read_chunk(this->from.saved, place.saved_at + this->saved_beyond, place.saved_at,
                              this->from.saved_steps, this->from, place, loaded, meets);
      }
    }
    this->next();
  }

  __device__ __forceinline__ void end(T* tile) {
    const bool prologue = this->from.saved != nullptr || this->from.gate != nullptr;
#pragma unroll
    for (int i = 0; i < Base::count; ++i) {
      if (prologue) through(chunks[i], saved[i]);
      *reinterpret_cast<uint4*>(this->target(tile, i)) = {chunks[i].word[0], chunks[i].word[1], chunks[i].word[2],
                                                          chunks[i].word[3]};
    }
  }

 private:
  __device__ __forceinline__ void through(Chunk<T>& chunk, const Chunk<T>& kept) const {
    constexpr int count = Chunk<T>::count;
    float grad[count], value[count];
#pragma unroll
    for (int v = 0; v < count; ++v) grad[v] = chunk.get(v), value[v] = kept.get(v);
    if (this->from.saved != nullptr) times_slope(grad, value, this->from.activation);
    if (this->from.gate != nullptr) {
#pragma unroll
      for (int v = 0, c = loaded.c; v < count; ++v, ++c) {
        while (c >= this->from.taps.channels) c -= this->from.taps.channels;
        grad[v] *= __ldg(this->from.gate + c);
      }
    }
    chunk = Chunk<T>();
#pragma unroll
    for (int v = 0; v < count; ++v) {
      T value_stored;
      store(value_stored, grad[v]);
      chunk.put(v, value_stored);
    }
  }
};

// Weights whose columns are innermost in memory: a tile [depth numbers of (tap, channel)][columns], asynchronous.
template <class T, int threads, int depth, int columns, int stride>
struct ColumnLoader {
  static constexpr int width = 16 / int(sizeof(T)), chunks = columns / width, pass = threads / chunks;
  static constexpr int count = depth / pass;
  static_assert(threads % chunks == 0 && depth % pass == 0);

  const Operand<T>& from;
  int line, column;
  bool in_columns;
  std::int64_t base, at[count];
  Tap taps[count];

  __device__ __forceinline__ ColumnLoader(const Operand<T>& operand, int first_column, int first_number)
      : from(operand), line(int(threadIdx.x) / chunks), column(int(threadIdx.x) % chunks) {
    base = first_column + column * width;
    in_columns = base < operand.positions.end;
    base += operand.positions.origin_h * operand.steps.h + operand.positions.origin_w * operand.steps.w;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      taps[i] = tap_at(first_number + line + i * pass, operand.taps);
      at[i] = base + distance(operand.taps, operand.steps, taps[i]);
    }
  }

  __device__ __forceinline__ void begin(T* tile) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const bool valid = in_columns && taps[i].i < from.taps.rows;
      copy_async<16>(tile + (line + i * pass) * stride + column * width, from.data + (valid ? at[i] : 0), valid);
      taps[i].c += depth;
      if (taps[i].c < from.taps.channels) {
        at[i] += depth * from.steps.c;
      } else {
        advance(taps[i], from.taps, 0);
        at[i] = base + distance(from.taps, from.steps, taps[i]);
      }
    }
  }
  __device__ __forceinline__ void end(T*) {}
};

}  // namespace mrvae::cuda

// Blocks whose threads take neighbouring elements of one channel; see cut.cuh.
#pragma once

#include "columns.cuh"

namespace mrvae::cuda::memory {

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

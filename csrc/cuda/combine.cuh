// The second stage of sums that are split over blocks: from (samples, rows, channels, inner) to (samples, channels).
#pragma once

#include <vector>

#include "planes.cuh"

namespace mrvae::cuda::memory {

// What one launch adds up for one tensor. `sum`, `dot` and `weight`, a factor of `sum`, may be nullptr.
template <class T>
struct Combination {
  const T* sum;
  const T* dot;
  const T* weight;
  std::int64_t rows, channels, inner;
  std::int32_t tiles;  // blocks a sample
  std::int32_t group;  // log2 of the lanes that add along `inner`
  Finish<T> finish;
};

constexpr int combine_limit = 24, combine_warps = 16;

// Tensors of one launch, in the kernel's arguments; first[i] is the first block of number i.
template <class T>
struct Combinations {
  Combination<T> items[combine_limit];
  std::uint32_t first[combine_limit + 1];
  int count;
};

// The number of the interval that `block` lies in
template <class Table>
__device__ __forceinline__ int find(const Table& table, std::uint32_t block) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.first[middle] <= block ? low : high) = middle;
  }
  return low;
}

template <class T>
__global__ void __launch_bounds__(combine_warps* lanes)
    combine_kernel(const __grid_constant__ Combinations<T> table) {
  __shared__ T sums[combine_warps * lanes], dots[combine_warps * lanes];
  const int which = find(table, blockIdx.x);
  const Combination<T>& item = table.items[which];
  const std::uint32_t block = blockIdx.x - table.first[which];
  const std::int64_t tile = block % std::uint32_t(item.tiles), sample = block / std::uint32_t(item.tiles);
  const int lane = threadIdx.x % lanes, warp = threadIdx.x / lanes, size = 1 << item.group;
  const std::int64_t channel = (tile * lanes + lane) >> item.group;
  T sum = 0, dot = 0;
  if (channel < item.channels) {
#pragma unroll 4
    for (std::int64_t r = warp; r < item.rows; r += combine_warps) {
      const std::int64_t at = ((sample * item.rows + r) * item.channels + channel) * item.inner;
      for (std::int64_t i = lane & (size - 1); i < item.inner; i += size) {
        if (item.sum != nullptr) sum += (item.weight != nullptr ? item.weight[at + i] : T(1)) * item.sum[at + i];
        if (item.dot != nullptr) dot += item.dot[at + i];
      }
    }
  }
  for (int distance = size / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(all_lanes, sum, distance);
    dot += __shfl_xor_sync(all_lanes, dot, distance);
  }
  sums[threadIdx.x] = sum;
  dots[threadIdx.x] = dot;
  __syncthreads();
  if (warp > 0 || channel >= item.channels || (lane & (size - 1)) != 0) return;
  for (int k = 1; k < combine_warps; ++k) {
    sum += sums[k * lanes + lane];
    dot += dots[k * lanes + lane];
  }
  item.finish.write(sample * item.channels + channel, sum, dot);
}

// Collects what is to be added up once the first stage is launched.
template <class T>
class Combiner {
 public:
  void add(const EpilogueShape& partial, const T* sum, const T* dot, const T* weight, const Finish<T>& finish) {
    if (partial.samples * partial.channels == 0) return;
    Combination<T> item{sum, dot, weight, partial.rows, partial.channels, partial.inner, 0, 0, finish};
    while (item.group < 5 && (std::int64_t(1) << item.group) < partial.inner) ++item.group;
    item.tiles = std::int32_t(quotient_up(partial.channels << item.group, lanes));
    items_.push_back(item);
    blocks_.push_back(std::uint32_t(partial.samples * item.tiles));
  }

  void launch_all(Stream stream) const {
    Combinations<T> table{};
    for (std::size_t i = 0; i < items_.size(); ++i) {
      table.items[table.count] = items_[i];
      table.first[table.count + 1] = table.first[table.count] + blocks_[i];
      if (++table.count < combine_limit && i + 1 < items_.size()) continue;
      launch("combine", combine_kernel<T>, dim3(table.first[table.count]), dim3(combine_warps * lanes), 0, stream,
             table);
      table.count = 0;
    }
  }

 private:
  std::vector<Combination<T>> items_;
  std::vector<std::uint32_t> blocks_;
};

}  // namespace mrvae::cuda::memory

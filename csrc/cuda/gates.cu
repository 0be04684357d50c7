// g[n, i] = act(sum_k w_k[i] P_k(eta[n]) + c[i]) for all gates of a model in one launch, and its gradients. Each degree has
// kernels of its own.
//
// A block takes 32 packs of columns of one slice, which its warps go down sample by sample.
#include "combine.cuh"
#include "kernels.h"

namespace mrvae::cuda {
namespace {

using namespace memory;

constexpr int slice_limit = 64;

template <class T>
struct Slice {
  std::int64_t offset, size;
  T* values;
  Gate kind;
  bool wide, wide_parameters;  // whole packs, aligned: its values, and its part of the parameters
};

// The slices of one launch, in the kernel's arguments; first[i] is the first block of number i.
template <class T>
struct Slices {
  Slice<T> items[slice_limit];
  std::uint32_t first[slice_limit + 1];
  int count;
  std::int64_t samples, block_samples;
  std::uint32_t parts;  // blocks along the samples
  std::int64_t first_tile;
};

template <Gate kind, bool slope, class T, int V>
__device__ __forceinline__ void each(T (&p)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) p[j] = slope ? gate_slope<kind>(p[j]) : gate_value<kind>(p[j]);
}

// p becomes the gate's value, or its slope
template <bool slope, class T, int V>
__device__ __forceinline__ void apply(T (&p)[V], Gate kind) {
  switch (kind) {
    case Gate::Sigmoid: each<Gate::Sigmoid, slope>(p); break;
    case Gate::Sqrt: each<Gate::Sqrt, slope>(p); break;
    case Gate::Softplus: each<Gate::Softplus, slope>(p); break;
    case Gate::Identity: each<Gate::Identity, slope>(p); break;
  }
}

// A thread's place: columns [column, column + V) of its slice, samples [first, last) in steps of the block's warps.
template <class T>
struct GatePlace {
  static constexpr int V = pack_size<T>;
  int which, lane, warp, warps;
  std::int64_t tile, part, column, first, last;
  std::int64_t row;  // the tile's number among all slices'
  __device__ __forceinline__ explicit GatePlace(const Slices<T>& table) {
    which = find(table, blockIdx.x);
    lane = int(threadIdx.x) % lanes, warp = int(threadIdx.x) / lanes, warps = int(blockDim.x) / lanes;
    const std::uint32_t block = blockIdx.x - table.first[which];
    tile = block / table.parts, part = block % table.parts;
    row = table.first_tile + blockIdx.x / table.parts;
    column = (tile * lanes + lane) * V;
    first = part * table.block_samples;
    last = first + table.block_samples < table.samples ? first + table.block_samples : table.samples;
  }
};

// V numbers from column on, zeros beyond `size`
template <class T, int V>
__device__ __forceinline__ void read_columns(const T* from, std::int64_t column, std::int64_t size, bool wide,
                                             T (&values)[V]) {
  if (column + V <= size) {
    read_values(from + column, values, wide);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) values[j] = column + j < size ? from[column + j] : T(0);
}

// The parameters of a thread's columns.
template <int degree, class T, int V>
struct Columns {
  T w[degree][V], c[V];
  __device__ __forceinline__ Columns(const GateParameters<const T>& all, const GatePlace<T>& place,
                                     const Slice<T>& slice) {
#pragma unroll
    for (int k = 0; k < degree; ++k) {
      read_columns(all.row(k) + slice.offset, place.column, slice.size, slice.wide_parameters, w[k]);
    }
    read_columns(all.bias + slice.offset, place.column, slice.size, slice.wide_parameters, c);
  }
  __device__ __forceinline__ T argument(int j, T eta) const {
    T rest = c[j];
#pragma unroll
    for (int k = 1; k < degree; ++k) rest += w[k][j] * polynomial(k, eta);
    return gate_argument(w[0][j], eta, rest);
  }
  __device__ __forceinline__ T slope(int j, T eta) const {  // dp / deta
    T sum = w[0][j];
#pragma unroll
    for (int k = 1; k < degree; ++k) sum += w[k][j] * polynomial_slope(k, eta);
    return sum;
  }
};

template <int degree, class T>
__global__ void __launch_bounds__(block_threads)
    gates_forward_kernel(const __grid_constant__ Slices<T> table, const GateParameters<const T> parameters,
                         const T* eta) {
  constexpr int V = pack_size<T>;
  const GatePlace<T> place(table);
  const Slice<T>& slice = table.items[place.which];
  if (place.column >= slice.size) return;
  const Columns<degree, T, V> columns(parameters, place, slice);
  for (std::int64_t n = place.first + place.warp; n < place.last; n += place.warps) {
    const T e = eta[n];
    T g[V];
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] = columns.argument(j, e);
    apply<false>(g, slice.kind);
    T* target = slice.values + n * slice.size + place.column;
    if (place.column + V <= slice.size) {
      write_values(target, g, slice.wide);
      continue;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (place.column + j < slice.size) target[j] = g[j];
    }
  }
}

// Where sums go: those of the parameters are (parts, total) each, deta is (tiles, samples) or nullptr.
template <class T>
struct GateSums {
  GateParameters<T> parameters;
  T* eta;
  std::int64_t total;
};

template <int degree, class T>
__global__ void __launch_bounds__(block_threads, 1)
    gates_backward_kernel(const __grid_constant__ Slices<T> table, const GateParameters<const T> parameters,
                          const T* eta, const __grid_constant__ GateSums<T> sums) {
  constexpr int V = pack_size<T>, rows = degree + 1;  // dw_0, dw_1, ..., dc
  __shared__ T of_thread[rows][block_threads * V];
  const GatePlace<T> place(table);
  const Slice<T>& slice = table.items[place.which];
  const Columns<degree, T, V> columns(parameters, place, slice);
  T found[rows][V] = {};
  for (std::int64_t start = place.first + place.warp; start < place.last; start += in_flight * place.warps) {
    T grad[in_flight][V];
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t n = start + q * place.warps;
#pragma unroll
      for (int j = 0; j < V; ++j) grad[q][j] = 0;
      if (n < place.last && slice.values != nullptr) {
        read_columns(slice.values + n * slice.size, place.column, slice.size, slice.wide, grad[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < in_flight; ++q) {
      const std::int64_t n = start + q * place.warps;
      if (n >= place.last) break;
      const T e = eta[n];
      T p[V], of_eta = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) p[j] = columns.argument(j, e);
      apply<true>(p, slice.kind);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        // of a column beyond the last p may be NaN
        const T dp = slice.values != nullptr && place.column + j < slice.size ? grad[q][j] * p[j] : T(0);
#pragma unroll
        for (int k = 0; k < degree; ++k) found[k][j] += dp * polynomial(k, e);
        found[degree][j] += dp;
        of_eta += dp * columns.slope(j, e);
      }
      if (sums.eta == nullptr) continue;
      of_eta = warp_sum(of_eta);
      if (place.lane == 0) sums.eta[place.row * table.samples + n] = of_eta;
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
#pragma unroll
    for (int row = 0; row < rows; ++row) of_thread[row][threadIdx.x * V + j] = found[row][j];
  }
  __syncthreads();
  const std::int64_t left = place.tile * lanes * V;
  for (int i = int(threadIdx.x); i < lanes * V && left + i < slice.size; i += int(blockDim.x)) {
    T sum[rows] = {};
    for (int k = 0; k < place.warps; ++k) {
#pragma unroll
      for (int row = 0; row < rows; ++row) sum[row] += of_thread[row][k * lanes * V + i];
    }
    const std::int64_t at = place.part * sums.total + slice.offset + left + i;
#pragma unroll
    for (int k = 0; k < degree; ++k) sums.parameters.row(k)[at] = sum[k];
    sums.parameters.bias[at] = sum[degree];
  }
}

// How many blocks work on what, for all launches of a model.
template <class T>
struct GateCut {
  std::int64_t tiles = 0, total = 0, block_samples, parts;
  GateCut(const std::vector<GateSlice<T>>& slices, std::int64_t samples) {
    for (const auto& slice : slices) {
      tiles += tiles_of(slice);
      total += slice.size;
    }
    block_samples = samples <= 256 ? std::max<std::int64_t>(1, samples)
                                   : std::max<std::int64_t>(128, quotient_up(samples * tiles, 1024));
    parts = std::max<std::int64_t>(1, quotient_up(samples, block_samples));
  }
  static std::int64_t tiles_of(const GateSlice<T>& slice) { return quotient_up(slice.size, lanes * pack_size<T>); }
};

// Calls f(table) for every 64 slices that have an element.
template <class T, class F>
void for_tables(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters,
                std::int64_t samples, const GateCut<T>& cut, const F& f) {
  Slices<T> table{};
  table.samples = samples, table.block_samples = cut.block_samples, table.parts = std::uint32_t(cut.parts);
  std::int64_t tile = 0;
  const auto flush = [&] {
    if (table.count > 0) f(table);
    table.count = 0;
    table.first_tile = tile;
  };
  for (const auto& slice : slices) {
    const std::int64_t tiles = GateCut<T>::tiles_of(slice);
    if (tiles == 0) continue;
    if (table.count == slice_limit) flush();
    const GateParameters<const T> own = parameters.from(slice.offset);
    const bool packs = slice.size % pack_size<T> == 0, rows = own.degree == 1 || own.stride % pack_size<T> == 0;
    table.items[table.count] = {slice.offset, slice.size, slice.values, slice.kind, packs && aligned({slice.values}),
                                packs && rows && aligned({own.weight, own.bias})};
    table.first[table.count + 1] = table.first[table.count] + std::uint32_t(tiles * cut.parts);
    ++table.count;
    tile += tiles;
  }
  flush();
}

unsigned threads_for(std::int64_t samples) {
  return unsigned(lanes * std::min<std::int64_t>(block_warps, std::max<std::int64_t>(1, samples)));
}

}  // namespace

template <class T>
void gates_forward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                   std::int64_t samples, Stream stream) {
  if (samples == 0) return;
  for_tables(slices, parameters, samples, GateCut<T>(slices, samples), [&](const Slices<T>& table) {
    with_degree(parameters.degree, [&](auto degree) {
      launch("gates_forward", gates_forward_kernel<degree, T>, dim3(table.first[table.count]), dim3(threads_for(samples)),
             0, stream, table, parameters, eta);
    });
  });
}

template <class T>
std::int64_t gates_backward_scratch(const std::vector<GateSlice<T>>& slices, std::int64_t samples, int degree,
                                    bool grad_eta) {
  const GateCut<T> cut(slices, samples);
  return std::int64_t(sizeof(T)) * ((cut.parts > 1 ? (degree + 1) * cut.parts * cut.total : 0) +
                                    (grad_eta && cut.tiles > 1 ? cut.tiles * samples : 0));
}

template <class T>
void gates_backward(const std::vector<GateSlice<T>>& slices, const GateParameters<const T>& parameters, const T* eta,
                    std::int64_t samples, const GateParameters<T>& grads, T* grad_eta, void* scratch, Stream stream) {
  const GateCut<T> cut(slices, samples);
  GateSums<T> sums{grads, grad_eta, cut.total};
  Combiner<T> combiner;
  T* free = static_cast<T*>(scratch);
  if (cut.parts > 1) {
    const std::int64_t all = cut.parts * cut.total;
    sums.parameters = {free, free + grads.degree * all, all, grads.degree};
    free += (grads.degree + 1) * all;
    const EpilogueShape shape{1, cut.parts, cut.total, 1};
    combiner.add(shape, sums.parameters.weight, sums.parameters.bias, nullptr,
                 {grads.weight, grads.bias, nullptr, nullptr, nullptr, nullptr});
    for (int k = 1; k < grads.degree; ++k) {
      combiner.add(shape, sums.parameters.row(k), nullptr, nullptr,
                   {grads.row(k), nullptr, nullptr, nullptr, nullptr, nullptr});
    }
  }
  if (grad_eta != nullptr && cut.tiles != 1) {
    sums.eta = free;
    combiner.add({1, cut.tiles, samples, 1}, sums.eta, nullptr, nullptr,
                 {grad_eta, nullptr, nullptr, nullptr, nullptr, nullptr});
  }
  for_tables(slices, parameters, samples, cut, [&](const Slices<T>& table) {
    with_degree(parameters.degree, [&](auto degree) {
      launch("gates_backward", gates_backward_kernel<degree, T>, dim3(table.first[table.count]),
             dim3(threads_for(samples)), 0, stream, table, parameters, eta, sums);
    });
  });
  combiner.launch_all(stream);
}

#define MRVAE_INSTANTIATE(T)                                                                                        \
  template void gates_forward<T>(const std::vector<GateSlice<T>>&, const GateParameters<const T>&, const T*,        \
                                 std::int64_t, Stream);                                                             \
  template std::int64_t gates_backward_scratch<T>(const std::vector<GateSlice<T>>&, std::int64_t, int, bool);       \
  template void gates_backward<T>(const std::vector<GateSlice<T>>&, const GateParameters<const T>&, const T*,       \
                                  std::int64_t, const GateParameters<T>&, T*, void*, Stream);
MRVAE_INSTANTIATE(float)
MRVAE_INSTANTIATE(double)
#undef MRVAE_INSTANTIATE

}  // namespace mrvae::cuda

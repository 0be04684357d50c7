// What follows a weight gradient: sums of the parts, and the gradients of gate, bias and shift. See products.h.
#include "products.h"
#include "slopes.cuh"

namespace mrvae::cuda {
namespace {

constexpr int threads = 256;

__device__ __forceinline__ float number(const void* values, Parameter type, std::int64_t i) {
  switch (type) {
    case Parameter::BFloat16: return load(static_cast<const BFloat16*>(values)[i]);
    case Parameter::Half: return load(static_cast<const Half*>(values)[i]);
    case Parameter::Double: return float(static_cast<const double*>(values)[i]);
    default: return static_cast<const float*>(values)[i];
  }
}

__device__ __forceinline__ void put(void* values, Parameter type, std::int64_t i, float value) {
  switch (type) {
    case Parameter::BFloat16: return store(static_cast<BFloat16*>(values)[i], value);
    case Parameter::Half: return store(static_cast<Half*>(values)[i], value);
    case Parameter::Double: return store(static_cast<double*>(values)[i], double(value));
    default: return store(static_cast<float*>(values)[i], value);
  }
}

// The sum over a block's threads with the same `column`, in column's first thread; the same order each time.
__device__ __forceinline__ float column_sum(float value, int column, int columns) {
  __shared__ float shared[threads];
  __syncthreads();
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = threads / 2; half >= columns; half /= 2) {
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[int(threadIdx.x) + half];
    __syncthreads();
  }
  return shared[column];
}

// A block takes `across` neighbouring gates, and each of its threads every threads / across-th element of one of them.
// Rows of a part are the weight's axis 0, its columns axis 1.
__global__ void __launch_bounds__(threads) finish_kernel(const Finish what, int across, int gates) {
  const int column = int(threadIdx.x) % across, first = int(threadIdx.x) / across;
  const int gate = int(blockIdx.x) * across + column;
  const bool by_rows = what.groups == 0;
  const int inner = by_rows ? what.columns : what.rows / (by_rows ? 1 : what.groups);
  const std::int64_t elements = gate < gates ? std::int64_t(what.taps) * inner : 0;
  const std::int64_t part = std::int64_t(what.rows) * what.taps * what.columns;
  const float factor = what.gate != nullptr && gate < gates ? what.gate[gate] : 1.0f;
  float dot = 0;
  if (what.parts != nullptr) {
    for (std::int64_t e = first; e < elements; e += threads / across) {
      // by rows an element is (tap, column), else (row of the group, tap)
      int row, tap, c;
      if (by_rows) {
        row = gate, tap = int(e / what.columns), c = int(e % what.columns);
      } else {
        row = gate / what.columns * inner + int(e / what.taps), tap = int(e % what.taps), c = gate % what.columns;
      }
      const std::int64_t at = (std::int64_t(row) * what.taps + tap) * what.columns + c;
      const int r = tap / what.kernel_width, s = tap % what.kernel_width;
      float sum = 0;
      for (int i = 0; i < what.splits; ++i) sum += what.parts[i * part + at];
      if (what.grad_gate != nullptr) {
        const std::int64_t place =
            row * what.weight_row + c * what.weight_column + r * what.weight_r + s * what.weight_s;
        dot += sum * number(what.weight, what.type, place);
      }
      if (what.grad_weight != nullptr) {
        const std::int64_t place = row * what.grad_row + c * what.grad_column + r * what.grad_r + s * what.grad_s;
        put(what.grad_weight, what.type, place, factor * sum);
      }
    }
  }
  if (what.grad_gate != nullptr) dot = column_sum(dot, column, across);
  float sum = 0;
  if (what.sums != nullptr) {
    if (gate < gates) {
      for (int i = first; i < what.sum_splits; i += threads / across) sum += what.sums[std::int64_t(i) * gates + gate];
    }
    sum = column_sum(sum, column, across);
  }
  if (first != 0 || gate >= gates) return;
  if (what.grad_gate != nullptr) {
    what.grad_gate[gate] = what.bias != nullptr ? dot + number(what.bias, what.bias_type, gate) * sum : dot;
  }
  if (what.grad_bias != nullptr) put(what.grad_bias, what.bias_type, gate, factor * sum);
  if (what.grad_shift != nullptr) what.grad_shift[gate] = sum;
}

// A block takes 32 channels, or, where positions are innermost, one, and a part of the positions.
__global__ void __launch_bounds__(threads)
    channel_sums_kernel(const ChannelSums what, int across, std::int64_t positions, std::int64_t chunk) {
  const int column = int(threadIdx.x) % across, channel = int(blockIdx.x) * across + column;
  const std::int64_t start = blockIdx.y * chunk, end = start + chunk < positions ? start + chunk : positions;
  float sum = 0;
  if (channel < what.channels) {
    for (std::int64_t at = start + int(threadIdx.x) / across; at < end; at += threads / across) {
      const std::int64_t line = at / what.size.w, w = at - line * what.size.w;
      const std::int64_t n = line / what.size.h, h = line - n * what.size.h;
      const auto place = [&](const View& view) { return n * view.n + channel * view.c + h * view.h + w * view.w; };
      float grad[1] = {number(what.grad.data, what.type, place(what.grad))};
      if (what.saved.data != nullptr) {
        const float saved[1] = {number(what.saved.data, what.type, place(what.saved))};
        times_slope(grad, saved, what.activation);
      }
      sum += grad[0];
    }
  }
  sum = column_sum(sum, column, across);
  if (int(threadIdx.x) < across && channel < what.channels) {
    what.parts[std::int64_t(blockIdx.y) * what.channels + channel] = sum;
  }
}

int channels_of_block(const ChannelSums& what) { return what.grad.c == 1 ? 32 : 1; }

}  // namespace

int sum_splits(const ChannelSums& what, int processors) {
  const std::int64_t positions = std::int64_t(what.samples) * what.size.h * what.size.w;
  const int across = channels_of_block(what);
  const std::int64_t blocks = (what.channels + across - 1) / across, most = positions * across / (4 * threads);
  std::int64_t splits = blocks > 0 ? (4 * std::int64_t(processors) + blocks - 1) / blocks : 1;
  splits = splits < most ? splits : most;
  return int(splits < 1 ? 1 : splits > 4096 ? 4096 : splits);
}

void channel_sums(const ChannelSums& what, void* stream) {
  const int across = channels_of_block(what);
  const std::int64_t positions = std::int64_t(what.samples) * what.size.h * what.size.w;
  if (what.channels == 0) return;
  const dim3 grid(unsigned((what.channels + across - 1) / across), unsigned(what.splits));
  launch("channel_sums", channel_sums_kernel, grid, dim3(threads), 0, stream, what, across, positions,
         (positions + what.splits - 1) / what.splits);
}

void finish(const Finish& what, void* stream) {
  const int gates = what.groups == 0 ? what.rows : what.groups * what.columns;
  const int across = what.groups == 0 ? 1 : 32;
  if (gates == 0) return;
  launch("finish", finish_kernel, dim3(unsigned((gates + across - 1) / across)), dim3(threads), 0, stream, what, across,
         gates);
}

}  // namespace mrvae::cuda

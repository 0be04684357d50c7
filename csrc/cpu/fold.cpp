#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t task_elements = 32768;    // weights a task should have
constexpr std::int64_t serial_elements = 65536;  // below this the thread pool costs more than it gives
constexpr std::int64_t long_inner = 64;          // from here on one channel's run is a loop of its own
constexpr std::int64_t short_inner = 8;          // below this one channel's run is no loop of its own
constexpr std::int64_t run_elements = 4096;      // longest run of short channels, in the first-level cache
constexpr std::int64_t width = 16;               // numbers of a block: a vector of floats
constexpr std::int64_t flush = 256;              // rows summed in float before they are added to the total

// out = g * in; in and out may be the same memory in every loop below
// By blocks of `width` numbers, whose loop needs no set-up: a channel may have two of them.
template <class S, class T>
MRVAE_CLONES void scale(const S* in, S* out, const T* g, std::int64_t channels, std::int64_t inner) {
  const std::int64_t whole = inner / width * width;
  for (std::int64_t c = 0; c < channels; ++c, in += inner, out += inner) {
    const T gate = g[c];
    for (std::int64_t i = 0; i < whole; i += width) {
#pragma omp simd
      for (std::int64_t k = 0; k < width; ++k) store(out[i + k], gate * load(in[i + k]));
    }
    for (std::int64_t i = whole; i < inner; ++i) store(out[i], gate * load(in[i]));
  }
}

template <class S, class T>
MRVAE_CLONES void multiply(const S* in, S* out, const T* g, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(out[i], g[i] * load(in[i]));
}

// Returns <grad, weight>, and sets out = g * grad unless out is nullptr.
template <class S, class T>
MRVAE_CLONES double scale_dot(const S* grad, const S* weight, S* out, T g, std::int64_t n) {
  double total = 0;
  for (std::int64_t begin = 0; begin < n; begin += run_elements) {
    const std::int64_t end = std::min(n, begin + run_elements);
    T dot = 0;
    if (out == nullptr) {
#pragma omp simd reduction(+ : dot)
      for (std::int64_t i = begin; i < end; ++i) dot += load(grad[i]) * load(weight[i]);
    } else {
#pragma omp simd reduction(+ : dot)
      for (std::int64_t i = begin; i < end; ++i) {
        const T d = load(grad[i]);
        dot += d * load(weight[i]);
        store(out[i], g * d);
      }
    }
    total += dot;
  }
  return total;
}

// The same for channels of short runs, whose sums are added to total: a reduction of its own costs a run of 16 numbers more
// than the numbers do.
template <bool with_out, class S, class T>
MRVAE_HOST_DEVICE void short_dots(const S* grad, const S* weight, S* out, const T* g, double* total,
                                  std::int64_t channels, std::int64_t inner) {
  const std::int64_t whole = inner / width * width;
  for (std::int64_t c = 0; c < channels; ++c, grad += inner, weight += inner) {
    const T gate = g[c];
    T lanes[width] = {}, rest = 0;
    for (std::int64_t i = 0; i < whole; i += width) {
#pragma omp simd
      for (std::int64_t k = 0; k < width; ++k) {
        const T d = load(grad[i + k]);
        lanes[k] += d * load(weight[i + k]);
        if constexpr (with_out) store(out[i + k], gate * d);
      }
    }
    for (std::int64_t i = whole; i < inner; ++i) {
      const T d = load(grad[i]);
      rest += d * load(weight[i]);
      if constexpr (with_out) store(out[i], gate * d);
    }
    total[c] += short_sum(lanes, width) + rest;
    if constexpr (with_out) out += inner;
  }
}

template <class S, class T>
MRVAE_CLONES void scale_dots(const S* grad, const S* weight, S* out, const T* g, double* total, std::int64_t channels,
                             std::int64_t inner) {
  out == nullptr ? short_dots<false>(grad, weight, out, g, total, channels, inner)
                 : short_dots<true>(grad, weight, out, g, total, channels, inner);
}

// Adds grad * weight to dot, and sets out = g * grad unless out is nullptr.
template <class S, class T>
MRVAE_CLONES void multiply_dot(const S* grad, const S* weight, S* out, const T* g, T* dot, std::int64_t n) {
  if (out == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) dot[i] += load(grad[i]) * load(weight[i]);
    return;
  }
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const T d = load(grad[i]);
    dot[i] += d * load(weight[i]);
    store(out[i], g[i] * d);
  }
}

// Adds the sums over each channel's `inner` neighbours to total.
template <class T>
MRVAE_CLONES void add_channels(const T* values, std::int64_t channels, std::int64_t inner, double* total) {
  for (std::int64_t c = 0; c < channels; ++c) total[c] += short_sum(values + c * inner, inner);
}

// Channels [begin, end) of one group of one layer, in rows [first, last) of its outer axis. `partial` is where its sums
// of dW' W start, one a channel.
struct Task {
  const FoldLayer* layer;
  std::int64_t group, begin, end, first, last, partial;
};

// Whether each channel's run is a loop of its own. Otherwise the gates are written out over a joined run, for all rows of
// the outer axis: with one row that is more work than the row.
bool by_channel(const FoldLayer& layer) {
  return layer.inner >= long_inner || (layer.outer == 1 && layer.inner >= short_inner);
}

// Where the channels are the fastest axes a task takes whole rows, so that it reads memory in long runs.
std::vector<Task> cut(const std::vector<FoldLayer>& layers, std::int64_t& elements, std::int64_t& partials) {
  std::vector<Task> tasks;
  elements = partials = 0;
  for (const FoldLayer& layer : layers) {
    const std::int64_t inner = std::max<std::int64_t>(1, layer.inner);
    std::int64_t channels = std::max<std::int64_t>(1, task_elements / inner);
    if (!by_channel(layer)) channels = std::min(channels, run_elements / inner);
    channels = std::min(channels, std::max<std::int64_t>(1, layer.channels));
    const std::int64_t rows = std::max<std::int64_t>(1, task_elements / (channels * inner));
    for (std::int64_t k = 0; k < layer.groups; ++k) {
      for (std::int64_t o = 0; o < layer.outer || o == 0; o += rows) {
        for (std::int64_t c = 0; c < layer.channels; c += channels) {
          const std::int64_t end = std::min(layer.channels, c + channels);
          tasks.push_back({&layer, k, c, end, o, std::min(layer.outer, o + rows), partials});
          partials += end - c;
        }
      }
    }
    elements += layer.groups * layer.outer * layer.channels * inner;
  }
  return tasks;
}

template <class T>
void spread(const T* gate, std::int64_t channels, std::int64_t inner, T* target) {
  for (std::int64_t c = 0; c < channels; ++c) target = std::fill_n(target, inner, gate[c]);
}

// First output channel of a task
std::int64_t base(const Task& task) { return task.group * task.layer->channels + task.begin; }

std::int64_t offset(const Task& task, std::int64_t row) {
  const FoldLayer& layer = *task.layer;
  return ((task.group * layer.outer + row) * layer.channels + task.begin) * layer.inner;
}

template <class T>
const T* parameter(const void* values, const Task& task) {
  return values == nullptr ? nullptr : static_cast<const T*>(values) + base(task);
}

template <class S, class T>
void forward(const Task& task) {
  const FoldLayer& layer = *task.layer;
  const std::int64_t inner = layer.inner, channels = task.end - task.begin;
  const T* gate = parameter<T>(layer.gate, task);
  T spread_gate[run_elements];
  const bool runs = !by_channel(layer);
  if (runs && inner > 1) spread(gate, channels, inner, spread_gate);
  for (std::int64_t o = task.first; o < task.last; ++o) {
    const S* weight = static_cast<const S*>(layer.weight) + offset(task, o);
    S* folded = static_cast<S*>(layer.folded) + offset(task, o);
    runs ? multiply<S, T>(weight, folded, inner == 1 ? gate : spread_gate, channels * inner)
         : scale<S, T>(weight, folded, gate, channels, inner);
  }
  if (layer.folded_bias == nullptr || task.first > 0) return;
  const T *bias = parameter<T>(layer.bias, task), *shift = parameter<T>(layer.shift, task);
  T* folded_bias = static_cast<T*>(layer.folded_bias) + base(task);
  for (std::int64_t c = 0; c < channels; ++c) {
    folded_bias[c] = (bias == nullptr ? T(0) : gate[c] * bias[c]) + (shift == nullptr ? T(0) : shift[c]);
  }
}

// dW = g dW', and total[c] = <dW', W> over the task's part of each channel
template <class S, class T>
void backward(const Task& task, double* total) {
  const FoldLayer& layer = *task.layer;
  const std::int64_t inner = layer.inner, channels = task.end - task.begin;
  const bool runs = !by_channel(layer), want_dot = layer.grad_gate != nullptr, want_weight = layer.grad_weight != nullptr;
  if (!want_dot && !want_weight) return;
  const T* gate = parameter<T>(layer.gate, task);
  T spread_gate[run_elements], dot[run_elements];
  if (runs && inner > 1) spread(gate, channels, inner, spread_gate);
  if (runs) std::fill_n(dot, channels * inner, T(0));
  for (std::int64_t o = task.first; o < task.last; ++o) {
    S* out = want_weight ? static_cast<S*>(layer.grad_weight) + offset(task, o) : nullptr;
    if (layer.grad == nullptr) {
      if (want_weight) std::fill_n(out, channels * inner, S{});
      continue;
    }
    const S* weight = static_cast<const S*>(layer.weight) + offset(task, o);
    const S* grad = static_cast<const S*>(layer.grad) + offset(task, o);
    if (!runs && !want_dot) {
      scale<S, T>(grad, out, gate, channels, inner);
      continue;
    }
    if (!runs && inner < long_inner) {
      scale_dots<S, T>(grad, weight, out, gate, total, channels, inner);
      continue;
    }
    if (!runs) {
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::int64_t i = c * inner;
        total[c] += scale_dot<S, T>(grad + i, weight + i, want_weight ? out + i : nullptr, gate[c], inner);
      }
      continue;
    }
    const T* factors = inner == 1 ? gate : spread_gate;
    if (!want_dot) {
      multiply<S, T>(grad, out, factors, channels * inner);
      continue;
    }
    multiply_dot<S, T>(grad, weight, out, factors, dot, channels * inner);
    if ((o + 1 - task.first) % flush != 0 && o + 1 < task.last) continue;
    add_channels(dot, channels, inner, total);
    std::fill_n(dot, channels * inner, T(0));
  }
}

// dg = <dW', W> + db' b, db = g db' and dt = db', once the tasks' sums are there
template <class T>
void finish(const FoldLayer& layer, const double* total) {
  const std::int64_t channels = layer.groups * layer.channels;
  const T *gate = static_cast<const T*>(layer.gate), *bias = static_cast<const T*>(layer.bias);
  const T* grad_bias = static_cast<const T*>(layer.grad_bias);
  T *grad_gate = static_cast<T*>(layer.grad_gate), *target = static_cast<T*>(layer.grad_layer_bias);
  for (std::int64_t c = 0; grad_gate != nullptr && c < channels; ++c) {
    grad_gate[c] = T(total[c]) + (bias == nullptr || grad_bias == nullptr ? T(0) : grad_bias[c] * bias[c]);
  }
  for (std::int64_t c = 0; target != nullptr && c < channels; ++c) {
    target[c] = grad_bias == nullptr ? T(0) : gate[c] * grad_bias[c];
  }
  if (T* grad_shift = static_cast<T*>(layer.grad_shift)) {
    grad_bias == nullptr ? std::fill_n(grad_shift, channels, T(0)) : std::copy_n(grad_bias, channels, grad_shift);
  }
}

std::int64_t grain(std::int64_t tasks, std::int64_t elements) {
  return std::max<std::int64_t>(1, tasks * serial_elements / std::max<std::int64_t>(1, elements));
}

}  // namespace

void fold_forward(const std::vector<FoldLayer>& layers) {
  std::int64_t elements, partials;
  const std::vector<Task> tasks = cut(layers, elements, partials);
  const auto count = std::int64_t(tasks.size());
  at::parallel_for(0, count, grain(count, elements), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      switch (tasks[k].layer->storage) {
        case Storage::Float: forward<float, float>(tasks[k]); break;
        case Storage::Double: forward<double, double>(tasks[k]); break;
        case Storage::BFloat16: forward<BFloat16, float>(tasks[k]); break;
        case Storage::Half: break;  // never: see kernels.h
      }
    }
  });
}

void fold_backward(const std::vector<FoldLayer>& layers) {
  std::int64_t elements, partials;
  const std::vector<Task> tasks = cut(layers, elements, partials);
  const auto count = std::int64_t(tasks.size());
  std::vector<double> sums(partials);
  at::parallel_for(0, count, grain(count, elements), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      double* total = sums.data() + tasks[k].partial;
      switch (tasks[k].layer->storage) {
        case Storage::Float: backward<float, float>(tasks[k], total); break;
        case Storage::Double: backward<double, double>(tasks[k], total); break;
        case Storage::BFloat16: backward<BFloat16, float>(tasks[k], total); break;
        case Storage::Half: break;  // never: see kernels.h
      }
    }
  });
  std::vector<double> total;
  std::size_t k = 0;
  for (const FoldLayer& layer : layers) {
    total.assign(layer.groups * layer.channels, 0.0);
    for (; k < tasks.size() && tasks[k].layer == &layer; ++k) {
      const double* from = sums.data() + tasks[k].partial;
      for (std::int64_t c = tasks[k].begin; c < tasks[k].end; ++c) total[tasks[k].group * layer.channels + c] += *from++;
    }
    layer.storage == Storage::Double ? finish<double>(layer, total.data()) : finish<float>(layer, total.data());
  }
}

}  // namespace mrvae::cpu

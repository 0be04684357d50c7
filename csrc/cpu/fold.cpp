#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "vector.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t task_elements = 32768;    // weights a task should have
constexpr std::int64_t serial_elements = 65536;  // below this the thread pool costs more than it gives
constexpr std::int64_t long_inner = 64;          // from here on one channel's run is a loop of its own
constexpr std::int64_t run_elements = 4096;      // longest run of short channels, in the first-level cache
constexpr std::int64_t flush = 256;              // rows summed in float before they are added to the total

// out = g * in; in and out may be the same memory in every loop below
template <class S, class T>
MRVAE_CLONES void scale(const S* in, S* out, T g, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) store(out[i], g * load(in[i]));
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

// Channels [begin, end) of one layer's group: all of their weights, so that a channel's sum is one task's own.
struct Task {
  const FoldLayer* layer;
  std::int64_t group, begin, end;
};

std::vector<Task> cut(const std::vector<FoldLayer>& layers, std::int64_t& elements) {
  std::vector<Task> tasks;
  elements = 0;
  for (const FoldLayer& layer : layers) {
    const std::int64_t each = std::max<std::int64_t>(1, layer.outer * layer.inner);
    const std::int64_t inner = std::max<std::int64_t>(1, layer.inner);
    std::int64_t block = std::max(task_elements / each, long_inner / inner);
    if (inner < long_inner) block = std::min(block, run_elements / inner);
    block = std::max<std::int64_t>(1, block);
    for (std::int64_t k = 0; k < layer.groups; ++k) {
      for (std::int64_t c = 0; c < layer.channels; c += block) {
        tasks.push_back({&layer, k, c, std::min(layer.channels, c + block)});
      }
    }
    elements += each * layer.groups * layer.channels;
  }
  return tasks;
}

template <class T>
void spread(const T* gate, std::int64_t channels, std::int64_t inner, T* target) {
  for (std::int64_t c = 0; c < channels; ++c) target = std::fill_n(target, inner, gate[c]);
}

template <class S, class T>
void forward(const Task& task) {
  const FoldLayer& layer = *task.layer;
  const std::int64_t inner = layer.inner, channels = task.end - task.begin;
  const std::int64_t base = task.group * layer.channels + task.begin;
  const T* gate = static_cast<const T*>(layer.gate) + base;
  T spread_gate[run_elements];
  if (inner < long_inner && inner > 1) spread(gate, channels, inner, spread_gate);
  for (std::int64_t o = 0; o < layer.outer; ++o) {
    const std::int64_t offset = ((task.group * layer.outer + o) * layer.channels + task.begin) * inner;
    const S* weight = static_cast<const S*>(layer.weight) + offset;
    S* folded = static_cast<S*>(layer.folded) + offset;
    if (inner < long_inner) {
      multiply<S, T>(weight, folded, inner == 1 ? gate : spread_gate, channels * inner);
    } else {
      for (std::int64_t c = 0; c < channels; ++c) scale<S, T>(weight + c * inner, folded + c * inner, gate[c], inner);
    }
  }
  if (layer.folded_bias == nullptr) return;
  const T* bias = layer.bias == nullptr ? nullptr : static_cast<const T*>(layer.bias) + base;
  const T* shift = layer.shift == nullptr ? nullptr : static_cast<const T*>(layer.shift) + base;
  T* folded_bias = static_cast<T*>(layer.folded_bias) + base;
  for (std::int64_t c = 0; c < channels; ++c) {
    folded_bias[c] = (bias == nullptr ? T(0) : gate[c] * bias[c]) + (shift == nullptr ? T(0) : shift[c]);
  }
}

// dot[c] = <dW', W> of each channel, and dW = g dW'
template <class S, class T>
void backward_weight(const Task& task, const T* gate, double* total) {
  const FoldLayer& layer = *task.layer;
  const std::int64_t inner = layer.inner, channels = task.end - task.begin;
  T spread_gate[run_elements], dot[run_elements];
  const bool runs = inner < long_inner, want_dot = layer.grad_gate != nullptr;
  if (runs && inner > 1) spread(gate, channels, inner, spread_gate);
  if (runs) std::fill_n(dot, channels * inner, T(0));
  for (std::int64_t o = 0; o < layer.outer; ++o) {
    const std::int64_t offset = ((task.group * layer.outer + o) * layer.channels + task.begin) * inner;
    const S* weight = static_cast<const S*>(layer.weight) + offset;
    const S* grad = static_cast<const S*>(layer.grad) + offset;
    S* out = layer.grad_weight == nullptr ? nullptr : static_cast<S*>(layer.grad_weight) + offset;
    if (!runs) {
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::int64_t i = c * inner;
        if (want_dot) {
          total[c] += scale_dot<S, T>(grad + i, weight + i, out == nullptr ? nullptr : out + i, gate[c], inner);
        } else {
          scale<S, T>(grad + i, out + i, gate[c], inner);
        }
      }
      continue;
    }
    const T* factors = inner == 1 ? gate : spread_gate;
    if (!want_dot) {
      multiply<S, T>(grad, out, factors, channels * inner);
      continue;
    }
    multiply_dot<S, T>(grad, weight, out, factors, dot, channels * inner);
    if ((o + 1) % flush != 0 && o + 1 < layer.outer) continue;
    for (std::int64_t c = 0; c < channels; ++c) {
      for (std::int64_t i = 0; i < inner; ++i) total[c] += dot[c * inner + i];
    }
    std::fill_n(dot, channels * inner, T(0));
  }
}

template <class S, class T>
void backward(const Task& task, std::vector<double>& total) {
  const FoldLayer& layer = *task.layer;
  const std::int64_t channels = task.end - task.begin, base = task.group * layer.channels + task.begin;
  const T* gate = static_cast<const T*>(layer.gate) + base;
  total.assign(channels, 0.0);
  if (layer.grad != nullptr && (layer.grad_weight != nullptr || layer.grad_gate != nullptr)) {
    backward_weight<S, T>(task, gate, total.data());
  } else if (layer.grad_weight != nullptr) {
    for (std::int64_t o = 0; o < layer.outer; ++o) {
      const std::int64_t offset = ((task.group * layer.outer + o) * layer.channels + task.begin) * layer.inner;
      std::fill_n(static_cast<S*>(layer.grad_weight) + offset, channels * layer.inner, S{});
    }
  }
  const T* grad_bias = layer.grad_bias == nullptr ? nullptr : static_cast<const T*>(layer.grad_bias) + base;
  if (layer.grad_gate != nullptr) {
    const bool biased = layer.bias != nullptr && grad_bias != nullptr;
    const T* bias = biased ? static_cast<const T*>(layer.bias) + base : nullptr;
    T* target = static_cast<T*>(layer.grad_gate) + base;
    for (std::int64_t c = 0; c < channels; ++c) {
      target[c] = T(total[c]) + (biased ? grad_bias[c] * bias[c] : T(0));
    }
  }
  if (layer.grad_layer_bias != nullptr) {
    T* target = static_cast<T*>(layer.grad_layer_bias) + base;
    for (std::int64_t c = 0; c < channels; ++c) target[c] = grad_bias == nullptr ? T(0) : gate[c] * grad_bias[c];
  }
}

std::int64_t grain(std::int64_t tasks, std::int64_t elements) {
  return std::max<std::int64_t>(1, tasks * serial_elements / std::max<std::int64_t>(1, elements));
}

}  // namespace

void fold_forward(const std::vector<FoldLayer>& layers) {
  std::int64_t elements;
  const std::vector<Task> tasks = cut(layers, elements);
  const auto count = std::int64_t(tasks.size());
  at::parallel_for(0, count, grain(count, elements), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      switch (tasks[k].layer->storage) {
        case Storage::Float: forward<float, float>(tasks[k]); break;
        case Storage::Double: forward<double, double>(tasks[k]); break;
        case Storage::BFloat16: forward<BFloat16, float>(tasks[k]); break;
      }
    }
  });
}

void fold_backward(const std::vector<FoldLayer>& layers) {
  std::int64_t elements;
  const std::vector<Task> tasks = cut(layers, elements);
  const auto count = std::int64_t(tasks.size());
  at::parallel_for(0, count, grain(count, elements), [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> total;
    for (std::int64_t k = begin; k < end; ++k) {
      switch (tasks[k].layer->storage) {
        case Storage::Float: backward<float, float>(tasks[k], total); break;
        case Storage::Double: backward<double, double>(tasks[k], total); break;
        case Storage::BFloat16: backward<BFloat16, float>(tasks[k], total); break;
      }
    }
  });
}

}  // namespace mrvae::cpu

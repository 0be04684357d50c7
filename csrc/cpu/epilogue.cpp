#include <ATen/Parallel.h>

#include <limits>
#include <memory>

#include "epilogue_rows.h"
#include "epilogue_samples.h"

namespace mrvae::cpu {
namespace {

constexpr std::int64_t task_elements = 16384;    // elements a task should have
constexpr std::int64_t serial_elements = 32768;  // below this the thread pool costs more than it gives
constexpr std::int64_t run_elements = 256;       // short rows are joined up to this length
constexpr std::int64_t flush_rows = 64;          // float sums are folded into their totals after this many runs

// Planes when one channel's run is long; otherwise g, b and t are spread out over a run and handled as vectors.
bool use_planes(const EpilogueShape& s) { return s.inner >= (s.samples == 1 ? 64 : 16); }

std::int64_t grain(std::int64_t elements_per_task) {
  return std::max<std::int64_t>(1, serial_elements / std::max<std::int64_t>(1, elements_per_task));
}

template <class T>
T at_or_zero(const T* values, std::int64_t i) {
  return values == nullptr ? T(0) : values[i];
}

// Whether u is y and -t takes the place of b: y - t = g (u + b).
template <class T>
bool subtracts(const EpilogueParameters<T>& with) {
  return with.of_result && with.shift != nullptr;
}

// g, b and t of one sample, repeated for each of the `inner` elements of a channel and over `repeats` rows.
template <class T>
class SpreadParameters {
 public:
  SpreadParameters(const EpilogueShape& shape, const EpilogueParameters<T>& with, std::int64_t repeats)
      : shape_(shape), with_(with), repeats_(repeats) {
    const std::int64_t length = shape.channels * shape.inner * repeats;
    const bool direct = repeats == 1 && shape.inner == 1 && !subtracts(with);
    if (direct && with.bias != nullptr && with.shift != nullptr) return;
    storage_.reset(new T[direct ? length : 3 * length]);
    if (direct) {
      std::fill_n(storage_.get(), length, T(0));
      return;
    }
    gate_ = storage_.get();
    bias_ = gate_ + length;
    shift_ = bias_ + length;
    if (shape.samples == 1) spread(0);
  }

  Vectors<T> sample(std::int64_t p) {
    const std::int64_t offset = p * shape_.channels;
    if (gate_ == nullptr) {
      return {with_.gate + offset, with_.bias == nullptr ? storage_.get() : with_.bias,
              with_.shift == nullptr ? storage_.get() : with_.shift + offset};
    }
    if (shape_.samples > 1) spread(offset);
    return {gate_, bias_, shift_};
  }

 private:
  // those of the sample whose gates begin there
  void spread(std::int64_t offset) const {
    spread(with_.gate + offset, gate_);
    spread(with_.shift == nullptr ? nullptr : with_.shift + offset, shift_);
    const std::int64_t length = shape_.channels * shape_.inner * repeats_;
    if (!subtracts(with_)) return spread(with_.bias, bias_);
    for (std::int64_t i = 0; i < length; ++i) bias_[i] = -shift_[i];
  }
  void spread(const T* values, T* target) const {
    for (std::int64_t r = 0; r < repeats_; ++r) {
      for (std::int64_t c = 0; c < shape_.channels; ++c) {
        for (std::int64_t i = 0; i < shape_.inner; ++i) *target++ = at_or_zero(values, c);
      }
    }
  }

  const EpilogueShape& shape_;
  const EpilogueParameters<T>& with_;
  std::int64_t repeats_;
  std::unique_ptr<T[]> storage_;
  T *gate_ = nullptr, *bias_ = nullptr, *shift_ = nullptr;
};

// How the rows of a sample are cut into tasks and runs. Depends on the shape alone.
struct Cut {
  std::int64_t row, repeats, rows_per_task, tasks_per_sample;
  explicit Cut(const EpilogueShape& s) : row(s.channels * s.inner) {
    repeats = std::clamp<std::int64_t>(run_elements / row, 1, std::max<std::int64_t>(1, s.rows / 4));
    // few enough tasks that their partial sums stay small beside the data
    const std::int64_t enough = std::max(task_elements / row, s.rows / 32);
    rows_per_task = std::max<std::int64_t>(repeats, enough / repeats * repeats);
    tasks_per_sample = (s.rows + rows_per_task - 1) / rows_per_task;
  }
};

template <class S, class T>
void forward(const EpilogueShape& s, const S* u, const EpilogueParameters<T>& with, S* y) {
  if (use_planes(s)) {
    const std::int64_t planes = s.samples * s.rows * s.channels;
    at::parallel_for(0, planes, grain(s.inner), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) {
        const std::int64_t c = k % s.channels, p = k / (s.rows * s.channels) * s.channels + c;
        const Constants<T> constants{with.gate[p], at_or_zero(with.bias, c), at_or_zero(with.shift, p)};
        forward_run<S, T>(u + k * s.inner, y + k * s.inner, s.inner, constants, with.activation);
      }
    });
    return;
  }
  if (by_rows(s) && inside_loops(with.activation)) {
    const Vectors<T> vectors{with.gate, with.bias, with.shift};
    at::parallel_for(0, s.rows, grain(s.channels), [&](std::int64_t begin, std::int64_t end) {
      forward_rows(u + begin * s.channels, y + begin * s.channels, end - begin, s.channels, vectors, with.activation);
    });
    return;
  }
  const Cut cut(s);
  at::parallel_for(
      0, s.samples * cut.tasks_per_sample, grain(std::min(s.rows, cut.rows_per_task) * cut.row),
      [&](std::int64_t begin, std::int64_t end) {
        SpreadParameters<T> parameters(s, with, cut.repeats);
        std::int64_t previous = -1;
        Vectors<T> vectors{};
        for (std::int64_t k = begin; k < end; ++k) {
          const std::int64_t p = k / cut.tasks_per_sample, first = k % cut.tasks_per_sample * cut.rows_per_task;
          const std::int64_t last = std::min(s.rows, first + cut.rows_per_task);
          if (p != previous) vectors = parameters.sample(p);
          previous = p;
          for (std::int64_t r = first; r < last; r += cut.repeats) {
            const std::int64_t offset = (p * s.rows + r) * cut.row;
            forward_run<S, T>(u + offset, y + offset, std::min(cut.repeats, last - r) * cut.row, vectors,
                              with.activation);
          }
        }
      });
}

// totals: (channels,) twice, sum dz and sum dz * (u + b) of sample p
template <class T>
void write_sums(const EpilogueShape& s, const std::vector<double>& totals, std::int64_t p,
                const EpilogueGradients<T>& out) {
  for (std::int64_t c = 0; c < s.channels; ++c) {
    out.shift[p * s.channels + c] = T(totals[c]);
    out.gate[p * s.channels + c] = T(totals[s.channels + c]);
  }
}

// sum over samples of g * dshift
template <class T>
void bias_gradient(const EpilogueShape& s, const T* gate, const T* grad_shift, T* grad_bias) {
  if (s.samples == 1) {
    for (std::int64_t c = 0; c < s.channels; ++c) grad_bias[c] = gate[c] * grad_shift[c];
    return;
  }
  std::vector<double> totals(s.channels);
  for (std::int64_t p = 0; p < s.samples; ++p) {
    const T *g = gate + p * s.channels, *d = grad_shift + p * s.channels;
    for (std::int64_t c = 0; c < s.channels; ++c) totals[c] += g[c] * d[c];
  }
  std::copy(totals.begin(), totals.end(), grad_bias);
}

template <class S, class T>
void backward_planes(const EpilogueShape& s, const S* grad, const S* u, const EpilogueParameters<T>& with,
                     const EpilogueGradients<T>& out) {
  const std::int64_t planes = s.samples * s.rows * s.channels;
  const bool sums = out.gate != nullptr;
  std::unique_ptr<T[]> partial(sums ? new T[2 * planes] : nullptr);
  T* dots = partial.get() + (sums ? planes : 0);
  at::parallel_for(0, planes, grain(s.inner), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
      const std::int64_t c = k % s.channels, p = k / (s.rows * s.channels) * s.channels + c, offset = k * s.inner;
      const Constants<T> constants{with.gate[p], subtracts(with) ? -with.shift[p] : at_or_zero(with.bias, c),
                                   at_or_zero(with.shift, p)};
      backward_plane(grad + offset, u + offset, s.inner, constants, with.activation,
                     out.u == nullptr ? nullptr : static_cast<S*>(out.u) + offset,
                     sums ? partial.get() + k : nullptr, sums ? dots + k : nullptr);
    }
  });
  if (!sums) return;
  std::vector<double> totals(2 * s.channels);
  for (std::int64_t p = 0; p < s.samples; ++p) {
    std::fill(totals.begin(), totals.end(), 0.0);
    for (std::int64_t r = 0; r < s.rows; ++r) {
      const std::int64_t row = (p * s.rows + r) * s.channels;
      for (std::int64_t c = 0; c < s.channels; ++c) {
        totals[c] += partial[row + c];
        totals[s.channels + c] += dots[row + c];
      }
    }
    write_sums(s, totals, p, out);
  }
}

// Sums over one task's rows. `target` is (channels,) twice, zero at first: sum dz, then sum dz * (u + b).
template <class S, class T>
void backward_rows(const EpilogueShape& s, const Cut& cut, const S* grad, const S* u, const Vectors<T>& vectors,
                   Activation activation, S* grad_u, std::int64_t rows, T* sum, T* dot, std::vector<T>& buffer) {
  const std::int64_t length = cut.repeats * cut.row;
  const bool spread = cut.repeats > 1 || s.inner > 1;
  const bool direct = !spread && rows <= flush_rows;  // the sums of few rows of channels go where they belong
  T *run_sum = sum, *run_dot = dot;
  if (sum != nullptr && !direct) {
    buffer.assign(2 * length, T(0));
    run_sum = buffer.data();
    run_dot = run_sum + length;
  }
  std::int64_t runs = 0;
  for (std::int64_t r = 0; r < rows; r += cut.repeats) {
    const std::int64_t offset = r * cut.row, n = std::min(cut.repeats, rows - r) * cut.row;
    backward_run(grad + offset, u + offset, n, vectors, activation, grad_u == nullptr ? nullptr : grad_u + offset,
                 run_sum, run_dot);
    if (sum == nullptr || direct) continue;
    if (++runs % flush_rows != 0 && r + cut.repeats < rows) continue;
    fold_sums(run_sum, cut.repeats, s.channels, s.inner, sum);
    fold_sums(run_dot, cut.repeats, s.channels, s.inner, dot);
    std::fill(buffer.begin(), buffer.end(), T(0));
  }
}

template <class S, class T>
void backward_runs(const EpilogueShape& s, const S* grad, const S* u, const EpilogueParameters<T>& with,
                   const EpilogueGradients<T>& out) {
  const Cut cut(s);
  const std::int64_t tasks = s.samples * cut.tasks_per_sample;
  const bool sums = out.gate != nullptr, direct = cut.tasks_per_sample == 1;
  std::vector<T> partial(sums && !direct ? 2 * tasks * s.channels : 0, T(0));
  at::parallel_for(
      0, tasks, grain(std::min(s.rows, cut.rows_per_task) * cut.row), [&](std::int64_t begin, std::int64_t end) {
        SpreadParameters<T> parameters(s, with, cut.repeats);
        std::vector<T> buffer;
        std::int64_t previous = -1;
        Vectors<T> vectors{};
        for (std::int64_t k = begin; k < end; ++k) {
          const std::int64_t p = k / cut.tasks_per_sample, first = k % cut.tasks_per_sample * cut.rows_per_task;
          const std::int64_t rows = std::min(s.rows - first, cut.rows_per_task), offset = (p * s.rows + first) * cut.row;
          if (p != previous) vectors = parameters.sample(p);
          previous = p;
          T *sum = nullptr, *dot = nullptr;
          if (sums) {
            sum = direct ? out.shift + p * s.channels : partial.data() + 2 * k * s.channels;
            dot = direct ? out.gate + p * s.channels : sum + s.channels;
          }
          backward_rows(s, cut, grad + offset, u + offset, vectors, with.activation,
                        out.u == nullptr ? nullptr : static_cast<S*>(out.u) + offset, rows, sum, dot, buffer);
        }
      });
  if (!sums || direct) return;
  std::vector<double> totals(2 * s.channels);
  for (std::int64_t p = 0; p < s.samples; ++p) {
    std::fill(totals.begin(), totals.end(), 0.0);
    for (std::int64_t k = p * cut.tasks_per_sample; k < (p + 1) * cut.tasks_per_sample; ++k) {
      for (std::int64_t i = 0; i < 2 * s.channels; ++i) totals[i] += partial[2 * k * s.channels + i];
    }
    write_sums(s, totals, p, out);
  }
}

template <class S, class T>
void backward(const EpilogueShape& s, const S* grad, const S* u, EpilogueParameters<T> with,
              EpilogueGradients<T> out) {
  if (with.of_result && with.activation == Activation::Relu) with.activation = relu_of_result;
  const std::int64_t parameters = s.samples * s.channels;
  if (one_element_a_gate(s) && parameters > 0) return backward_samples(s, grad, u, with, out, serial_elements);
  if (result_by_rows(s, with, out)) return backward_of_result(s, grad, u, with, out, serial_elements);
  // below the sums of gate and shift come together
  const bool sums = out.gate != nullptr || out.shift != nullptr || out.bias != nullptr;
  std::unique_ptr<T[]> unwanted(sums && (out.gate == nullptr || out.shift == nullptr) ? new T[2 * parameters] : nullptr);
  if (sums && out.gate == nullptr) out.gate = unwanted.get();
  if (sums && out.shift == nullptr) out.shift = unwanted.get() + parameters;
  if (sums) {
    std::fill_n(out.gate, parameters, T(0));
    std::fill_n(out.shift, parameters, T(0));
  }
  if (s.rows * s.inner > 0 && parameters > 0) {
    use_planes(s) ? backward_planes(s, grad, u, with, out) : backward_runs(s, grad, u, with, out);
  }
  if (out.bias != nullptr) bias_gradient(s, with.gate, out.shift, out.bias);
  if (with.of_result && out.gate != nullptr) {
    for (std::int64_t i = 0; i < parameters; ++i) {
      out.gate[i] = with.gate[i] == T(0) ? T(0) : out.gate[i] / with.gate[i];
    }
  }
}

}  // namespace

void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<float>& with,
                      void* y) {
  if (shape.samples * shape.rows * shape.channels * shape.inner == 0) return;
  if (storage == Storage::BFloat16) {
    forward(shape, static_cast<const BFloat16*>(u), with, static_cast<BFloat16*>(y));
  } else {
    forward(shape, static_cast<const float*>(u), with, static_cast<float*>(y));
  }
}

void epilogue_forward(Storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<double>& with,
                      void* y) {
  if (shape.samples * shape.rows * shape.channels * shape.inner == 0) return;
  forward(shape, static_cast<const double*>(u), with, static_cast<double*>(y));
}

void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<float>& with, const EpilogueGradients<float>& out) {
  if (storage == Storage::BFloat16) {
    backward(shape, static_cast<const BFloat16*>(grad), static_cast<const BFloat16*>(u), with, out);
  } else {
    backward(shape, static_cast<const float*>(grad), static_cast<const float*>(u), with, out);
  }
}

void epilogue_backward(Storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<double>& with, const EpilogueGradients<double>& out) {
  backward(shape, static_cast<const double*>(grad), static_cast<const double*>(u), with, out);
}

}  // namespace mrvae::cpu

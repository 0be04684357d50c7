// y = activation(g * (u + b) + t) and its gradients, in one pass over memory and, for sums, a small second launch.
#include "combine.cuh"
#include "kernels.h"

namespace mrvae::cuda {
namespace {

using namespace memory;

enum class Mode { Columns, Rows, Planes };  // Rows: columns, with gate and shift of each row its own

template <class S, int V, Mode mode>
__global__ void __launch_bounds__(block_threads, sizeof(S) == 8 ? 1 : 2)
    epilogue_forward_kernel(const __grid_constant__ Cut cut, const S* u,
                            const __grid_constant__ EpilogueParameters<Compute<S>> with, bool wide, S* y) {
  if constexpr (mode == Mode::Planes) {
    forward_planes<false, S, V>(cut, blockIdx.x, u, with, y);
  } else {
    forward_columns<false, mode == Mode::Rows, S, V>(cut, blockIdx.x, u, with, wide, y);
  }
}

// two blocks a multiprocessor: 4 packs in flight a thread are 32 KB
template <class S, int V, Mode mode>
__global__ void __launch_bounds__(block_threads, sizeof(S) == 8 ? 1 : 2)
    epilogue_backward_kernel(const __grid_constant__ Cut cut, const __grid_constant__ Backward<S> data,
                             const __grid_constant__ EpilogueParameters<Compute<S>> with, bool wide,
                             const __grid_constant__ Finish<Compute<S>> finish) {
  if constexpr (mode == Mode::Planes) {
    backward_planes<false, S, V>(cut, blockIdx.x, data, with, finish);
  } else {
    backward_columns<false, mode == Mode::Rows, S, V>(cut, blockIdx.x, data, with, wide, finish);
  }
}

struct Plan {
  EpilogueShape shape;  // where each row has its own gate: samples as rows
  Mode mode;
  int pack;
  Cut cut;
};

EpilogueShape normalized(const EpilogueShape& s, bool& per_row) {
  per_row = s.samples > 1 && s.rows == 1 && s.inner == 1;
  return per_row ? EpilogueShape{1, s.samples, s.channels, 1} : s;
}

Plan plan(const EpilogueShape& shape, int pack, bool pointers_aligned, bool sums) {
  Plan p;
  bool per_row;
  p.shape = normalized(shape, per_row);
  p.pack = use_packs(p.shape, pack, pointers_aligned) ? pack : 1;
  p.cut = cut_of(p.shape, p.pack, sums);
  p.mode = per_row ? Mode::Rows : p.cut.columns() ? Mode::Columns : Mode::Planes;
  return p;
}

// Parameters may be read 16 bytes at a time: by every pack's element index, or by whole packs of channels.
template <class T>
bool wide_parameters(const Plan& p, const EpilogueParameters<T>& with, std::initializer_list<const void*> more) {
  if (p.pack == 1 || !aligned({with.gate, with.shift}) || !aligned(more)) return false;
  return p.mode == Mode::Rows || (p.shape.inner == 1 && p.shape.channels % p.pack == 0 && aligned({with.bias}));
}

// Calls f(pack, mode) with both as types.
template <int pack, class F>
void with_types(const Plan& p, const F& f) {
  const auto of_mode = [&](auto width) {
    switch (p.mode) {
      case Mode::Columns: return f(width, std::integral_constant<Mode, Mode::Columns>());
      case Mode::Rows: return f(width, std::integral_constant<Mode, Mode::Rows>());
      case Mode::Planes: return f(width, std::integral_constant<Mode, Mode::Planes>());
    }
  };
  p.pack == 1 ? of_mode(std::integral_constant<int, 1>()) : of_mode(std::integral_constant<int, pack>());
}

template <class S>
void forward(const EpilogueShape& shape, const void* u, const EpilogueParameters<Compute<S>>& with, void* y,
             Stream stream) {
  if (shape.samples * shape.rows * shape.channels * shape.inner == 0) return;
  const Plan p = plan(shape, pack_size<S>, aligned({u, y}), false);
  const bool wide = wide_parameters(p, with, {});
  with_types<pack_size<S>>(p, [&](auto width, auto mode) {
    launch("epilogue_forward", epilogue_forward_kernel<S, decltype(width)::value, decltype(mode)::value>,
           dim3(p.cut.blocks), dim3(block_threads), 0, stream, p.cut, static_cast<const S*>(u), with, wide,
           static_cast<S*>(y));
  });
}

template <class S>
void backward(const EpilogueShape& shape, const void* grad, const void* u, const EpilogueParameters<Compute<S>>& with,
              const EpilogueGradients<Compute<S>>& out, void* scratch, Stream stream) {
  using T = Compute<S>;
  // tensors without elements have no memory
  const bool sums = out.gate != nullptr || out.bias != nullptr, shared = shape.samples == 1;
  Combiner<T> combiner, over_samples;
  const auto finish_samples = [&] {
    const EpilogueShape each{1, shape.samples, shape.channels, 1};
    over_samples.add(each, out.shift, nullptr, with.gate, {out.bias, nullptr, nullptr, nullptr, nullptr, nullptr});
    over_samples.launch_all(stream);
  };
  // for one gate a batch db = g dt
  const Finish<T> final{out.shift, out.gate, shared ? out.bias : nullptr, with.gate, nullptr, nullptr};
  if (shape.samples * shape.rows * shape.channels * shape.inner == 0) {
    if (!sums) return;
    combiner.add({shape.samples, 0, shape.channels, 1}, nullptr, nullptr, nullptr, final);
    combiner.launch_all(stream);
    if (!shared && out.bias != nullptr) finish_samples();
    return;
  }
  const Plan p = plan(shape, pack_size<S>, aligned({grad, u, out.u}), true);
  Backward<S> data{static_cast<const S*>(grad), static_cast<const S*>(u), static_cast<S*>(out.u), nullptr, nullptr};
  if (!sums && with.activation == Activation::None) data.u = nullptr;  // du = g dy
  const bool wide = wide_parameters(p, with, {out.gate, out.shift});
  const EpilogueShape partial = partial_shape(p.shape, p.cut);
  const std::int64_t count = partial.samples * partial.rows * partial.channels * partial.inner;
  T *sum = static_cast<T*>(scratch), *dot = sum + count;
  Finish<T> finish{};
  if (p.mode == Mode::Rows) {
    data.row_gate = out.gate;
    data.row_shift = out.shift;
    const bool in_parts = out.bias != nullptr && !is_final(partial);
    finish.sum = in_parts ? sum : out.bias;
    if (in_parts) {
      combiner.add(partial, sum, nullptr, nullptr, {out.bias, nullptr, nullptr, nullptr, nullptr, nullptr});
    }
  } else if (sums && is_final(partial)) {
    finish = final;
  } else if (sums) {
    finish.sum = sum;
    finish.dot = dot;
    combiner.add(partial, sum, dot, nullptr, final);
  }
  with_types<pack_size<S>>(p, [&](auto width, auto mode) {
    launch("epilogue_backward", epilogue_backward_kernel<S, decltype(width)::value, decltype(mode)::value>,
           dim3(p.cut.blocks), dim3(block_threads), 0, stream, p.cut, data, with, wide, finish);
  });
  combiner.launch_all(stream);
  if (out.bias != nullptr && !shared && p.mode != Mode::Rows) finish_samples();
}

}  // namespace

void epilogue_forward(Storage storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<float>& with,
                      void* y, Stream stream) {
  switch (storage) {
    case Storage::BFloat16: return forward<BFloat16>(shape, u, with, y, stream);
    case Storage::Half: return forward<Half>(shape, u, with, y, stream);
    default: return forward<float>(shape, u, with, y, stream);
  }
}

void epilogue_forward(Storage, const EpilogueShape& shape, const void* u, const EpilogueParameters<double>& with,
                      void* y, Stream stream) {
  forward<double>(shape, u, with, y, stream);
}

std::int64_t epilogue_backward_scratch(Storage storage, const EpilogueShape& shape, bool sums) {
  if (!sums || shape.samples * shape.rows * shape.channels * shape.inner == 0) return 0;
  const int bytes = storage == Storage::Double ? 8 : storage == Storage::Float ? 4 : 2;
  bool per_row;
  const EpilogueShape s = normalized(shape, per_row);
  return partial_size(s, 16 / bytes) * (per_row ? 1 : 2) * (bytes == 8 ? 8 : 4);
}

void epilogue_backward(Storage storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<float>& with, const EpilogueGradients<float>& out, void* scratch,
                       Stream stream) {
  switch (storage) {
    case Storage::BFloat16: return backward<BFloat16>(shape, grad, u, with, out, scratch, stream);
    case Storage::Half: return backward<Half>(shape, grad, u, with, out, scratch, stream);
    default: return backward<float>(shape, grad, u, with, out, scratch, stream);
  }
}

void epilogue_backward(Storage, const EpilogueShape& shape, const void* grad, const void* u,
                       const EpilogueParameters<double>& with, const EpilogueGradients<double>& out, void* scratch,
                       Stream stream) {
  backward<double>(shape, grad, u, with, out, scratch, stream);
}

}  // namespace mrvae::cuda

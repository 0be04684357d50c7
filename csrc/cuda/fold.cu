// W' = g W and b' = g b + t of all layers in one launch, and their gradients.
//
// A layer is an epilogue without bias, shift and activation (columns.cuh, planes.cuh); blocks after those of its weight handle its
// vectors of one number a channel.
#include "combine.cuh"
#include "kernels.h"

namespace mrvae::cuda {
namespace {

using namespace memory;

template <class S>
struct ForwardLayer {
  using T = Compute<S>;
  Cut cut;
  const S* weight;
  S* folded;
  const T* gate;
  const T* bias;
  const T* shift;
  T* folded_bias;
  std::int64_t outputs;
  bool wide;
};

template <class S>
struct BackwardLayer {
  using T = Compute<S>;
  Cut cut;
  Backward<S> data;  // without dy: dW is zero
  const T* gate;
  Finish<T> finish;
  const T* bias;
  const T* grad_bias;
  T* grad_gate;  // where no weight contributes to it
  T* grad_layer_bias;
  T* grad_shift;
  std::int64_t outputs;
  bool wide;
};

// The layers of one launch, in the kernel's 4 KB of arguments; first[i] is the first block of number i.
template <class Item>
struct Layers {
  static constexpr int limit = int((4096 - 8) / (sizeof(Item) + 4)) - 1;
  Item items[limit];
  std::uint32_t first[limit + 1];
  int count;
};

template <class S>
__global__ void __launch_bounds__(block_threads)
    fold_forward_kernel(const __grid_constant__ Layers<ForwardLayer<S>> table) {
  using T = Compute<S>;
  const int which = find(table, blockIdx.x);
  const ForwardLayer<S>& layer = table.items[which];
  const std::uint32_t block = blockIdx.x - table.first[which];
  if (block >= layer.cut.blocks) {
    const std::int64_t i = std::int64_t(block - layer.cut.blocks) * block_threads + threadIdx.x;
    if (i >= layer.outputs) return;
    const T scaled = layer.bias != nullptr ? layer.gate[i] * layer.bias[i] : T(0);
    layer.folded_bias[i] = layer.shift != nullptr ? scaled + layer.shift[i] : scaled;
    return;
  }
  const EpilogueParameters<T> with{layer.gate, nullptr, nullptr, Activation::None};
  if (layer.cut.group >= 0) {
    if (layer.cut.packed) {
      forward_planes<true, S, pack_size<S>>(layer.cut, block, layer.weight, with, layer.folded);
    } else {
      forward_planes<true, S, 1>(layer.cut, block, layer.weight, with, layer.folded);
    }
  } else if (layer.cut.packed) {
    forward_columns<true, false, S, pack_size<S>>(layer.cut, block, layer.weight, with, layer.wide, layer.folded);
  } else {
    forward_columns<true, false, S, 1>(layer.cut, block, layer.weight, with, false, layer.folded);
  }
}

template <class S>
__global__ void __launch_bounds__(block_threads, 2)
    fold_backward_kernel(const __grid_constant__ Layers<BackwardLayer<S>> table) {
  using T = Compute<S>;
  const int which = find(table, blockIdx.x);
  const BackwardLayer<S>& layer = table.items[which];
  const std::uint32_t block = blockIdx.x - table.first[which];
  if (block >= layer.cut.blocks) {
    const std::int64_t i = std::int64_t(block - layer.cut.blocks) * block_threads + threadIdx.x;
    if (i >= layer.outputs) return;
    const T d = layer.grad_bias != nullptr ? layer.grad_bias[i] : T(0);
    if (layer.grad_layer_bias != nullptr) layer.grad_layer_bias[i] = layer.gate[i] * d;
    if (layer.grad_shift != nullptr) layer.grad_shift[i] = d;
    if (layer.grad_gate != nullptr) {
      layer.grad_gate[i] = layer.bias != nullptr && layer.grad_bias != nullptr ? d * layer.bias[i] : T(0);
    }
    return;
  }
  if (layer.data.dy == nullptr) {
    const std::int64_t first = std::int64_t(block) * block_threads * in_flight, all = layer.cut.size;
    for (std::int64_t i = first + threadIdx.x; i < all && i < first + block_threads * in_flight; i += block_threads) {
      layer.data.du[i] = S{};
    }
    return;
  }
  const EpilogueParameters<T> with{layer.gate, nullptr, nullptr, Activation::None};
  if (layer.cut.group >= 0) {
    if (layer.cut.packed) {
      backward_planes<true, S, pack_size<S>>(layer.cut, block, layer.data, with, layer.finish);
    } else {
      backward_planes<true, S, 1>(layer.cut, block, layer.data, with, layer.finish);
    }
  } else if (layer.cut.packed) {
    backward_columns<true, false, S, pack_size<S>>(layer.cut, block, layer.data, with, layer.wide, layer.finish);
  } else {
    backward_columns<true, false, S, 1>(layer.cut, block, layer.data, with, false, layer.finish);
  }
}

EpilogueShape shape_of(const FoldLayer& layer) { return {layer.groups, layer.outer, layer.channels, layer.inner}; }

std::int64_t elements(const FoldLayer& layer) { return layer.groups * layer.outer * layer.channels * layer.inner; }

int pack_of(Storage storage) { return storage == Storage::Double ? 2 : storage == Storage::Float ? 4 : 8; }

Cut cut_layer(const FoldLayer& layer, bool pointers_aligned, bool sums) {
  if (elements(layer) == 0) return {};
  const EpilogueShape shape = shape_of(layer);
  const int pack = pack_of(layer.storage);
  return cut_of(shape, use_packs(shape, pack, pointers_aligned) ? pack : 1, sums);
}

bool wide_gate(const FoldLayer& layer, const Cut& cut) {
  return cut.packed && layer.inner == 1 && layer.channels % pack_of(layer.storage) == 0 && aligned({layer.gate});
}

std::uint32_t vector_blocks(std::int64_t outputs) { return std::uint32_t(quotient_up(outputs, block_threads)); }

// Collects layers with their numbers of blocks, and launches a full table.
template <class Item>
class Table {
 public:
  Table(const char* name, void (*kernel)(Layers<Item>), Stream stream)
      : name_(name), kernel_(kernel), stream_(stream) {}

  void add(const Item& item, std::uint32_t blocks) {
    if (blocks == 0) return;
    if (table_.count == Layers<Item>::limit) launch_all();
    table_.items[table_.count] = item;
    table_.first[table_.count + 1] = table_.first[table_.count] + blocks;
    ++table_.count;
  }

  void launch_all() {
    if (table_.count == 0) return;
    launch(name_, kernel_, dim3(table_.first[table_.count]), dim3(block_threads), 0, stream_, table_);
    table_.count = 0;
  }

 private:
  const char* name_;
  void (*kernel_)(Layers<Item>);
  Stream stream_;
  Layers<Item> table_{};
};

template <class S>
void forward(const std::vector<FoldLayer>& layers, Storage storage, Stream stream) {
  using T = Compute<S>;
  Table<ForwardLayer<S>> table("fold_forward", fold_forward_kernel<S>, stream);
  for (const FoldLayer& layer : layers) {
    if (layer.storage != storage) continue;
    ForwardLayer<S> item{};
    item.cut = cut_layer(layer, aligned({layer.weight, layer.folded}), false);
    item.weight = static_cast<const S*>(layer.weight), item.folded = static_cast<S*>(layer.folded);
    item.gate = static_cast<const T*>(layer.gate), item.bias = static_cast<const T*>(layer.bias);
    item.shift = static_cast<const T*>(layer.shift), item.folded_bias = static_cast<T*>(layer.folded_bias);
    item.outputs = layer.groups * layer.channels;
    item.wide = wide_gate(layer, item.cut);
    table.add(item, item.cut.blocks + (layer.folded_bias != nullptr ? vector_blocks(item.outputs) : 0));
  }
  table.launch_all();
}

// Bytes of partial sums, a multiple of 16
std::int64_t scratch_of(const FoldLayer& layer) {
  if (layer.grad_gate == nullptr || layer.grad == nullptr || elements(layer) == 0) return 0;
  const std::int64_t bytes = layer.storage == Storage::Double ? 8 : 4;
  return quotient_up(partial_size(shape_of(layer), pack_of(layer.storage)) * bytes, 16) * 16;
}

template <class S>
void backward(const std::vector<FoldLayer>& layers, Storage storage, void* scratch, Stream stream) {
  using T = Compute<S>;
  Table<BackwardLayer<S>> table("fold_backward", fold_backward_kernel<S>, stream);
  Combiner<T> combiner;
  auto* free = static_cast<unsigned char*>(scratch);
  for (const FoldLayer& layer : layers) {
    T* partial_sums = reinterpret_cast<T*>(free);
    free += scratch_of(layer);
    if (layer.storage != storage) continue;
    BackwardLayer<S> item{};
    const bool dots = layer.grad_gate != nullptr && layer.grad != nullptr && elements(layer) > 0;
    item.gate = static_cast<const T*>(layer.gate), item.bias = static_cast<const T*>(layer.bias);
    item.grad_bias = static_cast<const T*>(layer.grad_bias);
    item.grad_layer_bias = static_cast<T*>(layer.grad_layer_bias);
    item.grad_shift = static_cast<T*>(layer.grad_shift);
    item.outputs = layer.groups * layer.channels;
    item.data.dy = static_cast<const S*>(layer.grad), item.data.du = static_cast<S*>(layer.grad_weight);
    T* grad_gate = static_cast<T*>(layer.grad_gate);
    if (!dots) item.grad_gate = grad_gate;
    if (layer.grad == nullptr) {
      item.cut.size = elements(layer);
      if (layer.grad_weight != nullptr) {
        item.cut.blocks = std::uint32_t(quotient_up(item.cut.size, block_threads * in_flight));
      }
    } else if (dots || layer.grad_weight != nullptr) {
      item.data.u = dots ? static_cast<const S*>(layer.weight) : nullptr;
      item.cut = cut_layer(layer, aligned({layer.grad, item.data.u, layer.grad_weight}), true);
      item.wide = wide_gate(layer, item.cut);
    }
    if (dots) {
      const Finish<T> final{nullptr, grad_gate, nullptr, nullptr, item.grad_bias, item.bias};
      const EpilogueShape partial = partial_shape(shape_of(layer), item.cut);
      if (is_final(partial)) {
        item.finish = final;
      } else {
        item.finish.dot = partial_sums;
        combiner.add(partial, nullptr, partial_sums, nullptr, final);
      }
    }
    const bool vectors = item.grad_layer_bias != nullptr || item.grad_shift != nullptr || item.grad_gate != nullptr;
    table.add(item, item.cut.blocks + (vectors ? vector_blocks(item.outputs) : 0));
  }
  table.launch_all();
  combiner.launch_all(stream);
}

// Calls f(storage type, its name) for each that the layers have.
template <class F>
void for_storages(const std::vector<FoldLayer>& layers, const F& f) {
  const auto has = [&](Storage storage) {
    return std::any_of(layers.begin(), layers.end(), [&](const FoldLayer& layer) { return layer.storage == storage; });
  };
  if (has(Storage::Float)) f(float(), Storage::Float);
  if (has(Storage::Double)) f(double(), Storage::Double);
  if (has(Storage::BFloat16)) f(BFloat16(), Storage::BFloat16);
  if (has(Storage::Half)) f(Half(), Storage::Half);
}

}  // namespace

void fold_forward(const std::vector<FoldLayer>& layers, Stream stream) {
  for_storages(layers, [&](auto s, Storage storage) { forward<decltype(s)>(layers, storage, stream); });
}

std::int64_t fold_backward_scratch(const std::vector<FoldLayer>& layers) {
  std::int64_t bytes = 0;
  for (const FoldLayer& layer : layers) bytes += scratch_of(layer);
  return bytes;
}

void fold_backward(const std::vector<FoldLayer>& layers, void* scratch, Stream stream) {
  for_storages(layers, [&](auto s, Storage storage) { backward<decltype(s)>(layers, storage, scratch, stream); });
}

}  // namespace mrvae::cuda

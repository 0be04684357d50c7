#include "products.h"

#include <algorithm>

#include "fragments.cuh"

namespace mrvae::cuda {
namespace plans {

template <class Math>
void run(const Convolution& what, int processors, Stream stream);
template <class Math>
void run(const WeightGradient& what, int processors, Stream stream);

template <class What>
void dispatch(const What& what, int processors, Stream stream) {
  switch (what.numbers) {
    case Numbers::BFloat16: return run<Half16<BFloat16>>(what, processors, stream);
    case Numbers::Half: return run<Half16<Half>>(what, processors, stream);
    case Numbers::Tf32: return run<Tf32>(what, processors, stream);
    default: return run<Plain>(what, processors, stream);
  }
}

}  // namespace plans

void convolve(const Convolution& what, int processors, void* stream) {
  const std::int64_t results = std::int64_t(what.samples) * what.out.h * what.out.w;
  if (results > 0 && what.columns > 0 && what.groups > 0) plans::dispatch(what, processors, stream);
}

void plan_parts(WeightGradient& what, int processors) {
  constexpr std::int64_t most = 16, small = 1 << 20, large = 1 << 26, shortest = 128;
  const std::int64_t positions = std::int64_t(what.samples) * what.a_size.h * what.a_size.w;
  const std::int64_t columns = std::int64_t(what.kernel.h) * what.kernel.w * what.b_channels;
  const std::int64_t elements = std::max<std::int64_t>(1, what.groups * columns * what.a_channels);
  const auto tiles = [](std::int64_t size) { return (size + 63) / 64; };
  const std::int64_t blocks = std::max<std::int64_t>(1, what.groups * tiles(what.a_channels) * tiles(columns));
  // two blocks a processor, of at least `shortest` positions; many parts of small weights only
  const std::int64_t allowed = std::min(std::max(most, small / elements), std::max<std::int64_t>(1, large / elements));
  std::int64_t splits = std::min({(2 * processors + blocks - 1) / blocks, allowed, positions / shortest});
  splits = std::max<std::int64_t>(1, std::min<std::int64_t>(splits, 65535));
  constexpr std::int64_t step = 32;  // a tile's depth, or two
  what.chunk = int(std::max<std::int64_t>(step, (positions + splits * step - 1) / (splits * step) * step));
  what.splits = int(std::max<std::int64_t>(1, (positions + what.chunk - 1) / what.chunk));
}

void weight_gradient(const WeightGradient& what, int processors, void* stream) {
  if (what.groups > 0 && what.a_channels > 0 && what.b_channels > 0 && what.kernel.h > 0 && what.kernel.w > 0) {
    plans::dispatch(what, processors, stream);
  }
}

}  // namespace mrvae::cuda

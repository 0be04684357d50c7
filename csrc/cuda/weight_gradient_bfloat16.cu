#include "plans.cuh"

namespace mrvae::cuda::plans {

template void run<Half16<BFloat16>>(const WeightGradient&, int, Stream);

}  // namespace mrvae::cuda::plans

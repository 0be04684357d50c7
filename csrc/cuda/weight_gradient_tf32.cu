#include "plans.cuh"

namespace mrvae::cuda::plans {

template void run<Tf32>(const WeightGradient&, int, Stream);

}  // namespace mrvae::cuda::plans

#include "plans.cuh"

namespace mrvae::cuda::plans {

template void run<Plain>(const WeightGradient&, int, Stream);

}  // namespace mrvae::cuda::plans

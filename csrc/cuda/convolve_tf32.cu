#include "plans.cuh"

namespace mrvae::cuda::plans {

template void run<Tf32>(const Convolution&, int, Stream);

}  // namespace mrvae::cuda::plans

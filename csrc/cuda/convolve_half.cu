#include "plans.cuh"

namespace mrvae::cuda::plans {

template void run<Half16<Half>>(const Convolution&, int, Stream);

}  // namespace mrvae::cuda::plans

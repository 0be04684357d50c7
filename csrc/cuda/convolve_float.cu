#include "plans.cuh"

namespace mrvae::cuda::plans {

template void run<Plain>(const Convolution&, int, Stream);

}  // namespace mrvae::cuda::plans

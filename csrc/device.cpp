#include "device.h"

#if defined(MRVAE_CUDA) && !defined(MRVAE_SHIM)
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace mrvae {

#if defined(MRVAE_CUDA) && !defined(MRVAE_SHIM)

Launch::Launch(const at::Tensor& tensor)
    : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream()) {}

int processors(const at::Tensor& tensor) {
  return at::cuda::getDeviceProperties(tensor.device().index())->multiProcessorCount;
}

#else

Launch::Launch(const at::Tensor& tensor) : guard_(tensor.device()), stream_(nullptr) {}

// a few, so that small tensors are cut too
int processors(const at::Tensor&) { return 4; }

#endif

}  // namespace mrvae

// Which tensors the GPU kernels take, and where they are launched: the tensor's device, its current stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

namespace mrvae {

// The dispatch key that the CUDA kernels are registered for, in a build that has them. MRVAE_SHIM, a build for tests,
// runs their source on the CPU and takes CPU tensors for the GPU's.
#if defined(MRVAE_SHIM)
constexpr auto gpu_type = c10::DeviceType::CPU;
#else
constexpr auto gpu_type = c10::DeviceType::CUDA;
#endif

inline bool on_gpu(const at::Tensor& tensor) {
#if defined(MRVAE_CUDA)
  return tensor.device().type() == gpu_type;
#else
  return false;
#endif
}

// Tensors that this build has kernels for: what an eager call may hand to them without the dispatcher.
inline bool has_kernels(const at::Tensor& tensor) { return tensor.is_cpu() || on_gpu(tensor); }

// While it lives the tensor's device is the current one; `stream` is its current stream, a cudaStream_t.
class Launch {
 public:
  explicit Launch(const at::Tensor& tensor);
  void* stream() const { return stream_; }

 private:
  c10::DeviceGuard guard_;
  void* stream_;
};

// Multiprocessors of the tensor's device, by which work is cut: the same bits each time on one device.
int processors(const at::Tensor& tensor);

}  // namespace mrvae

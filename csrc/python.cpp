// The module mrvae_kernels._C: how it was built, and short cuts to the operators for the hot path of an eager step.
//
// A short cut calls the same operator through the dispatcher, so that autograd, autocast and tracing see what they always
// see; it only leaves out torch.ops' own reading of Python arguments: 1.2 us of 6.2 us on a layer of 16 x 32.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>

#include "build_facts.h"
#include "python_layers.h"
#include "sample_norm.h"

// a build of the tests' own may leave these out
#ifndef MRVAE_BUILD_ARCHITECTURES
#define MRVAE_BUILD_ARCHITECTURES ""
#endif
#ifndef MRVAE_BUILD_NVCC_FLAGS
#define MRVAE_BUILD_NVCC_FLAGS ""
#endif

namespace py = pybind11;

namespace mrvae {
namespace {

// All gates of a model: the sizes and kinds of its slices, read from Python once.
class Bank {
 public:
  Bank(std::vector<std::int64_t> sizes, std::vector<std::int64_t> kinds)
      : sizes_(std::move(sizes)), kinds_(std::move(kinds)) {}

  std::vector<Tensor> gates(const Tensor& weight, const Tensor& bias, const Tensor& eta) const {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("mrvae::gates", "").typed<decltype(mrvae::gates)>();
    return op.call(weight, bias, eta, sizes_, kinds_);
  }

  std::vector<Tensor> gates_at(const Tensor& weight, const Tensor& bias, double eta) const {
    const auto options = weight.options().dtype(gate_dtype(weight.scalar_type())).requires_grad(false);
    return gates(weight, bias, at::scalar_tensor(eta, options));
  }

 private:
  std::vector<std::int64_t> sizes_, kinds_;
};

// Whether kernels may read these tensors as they lie in memory; see eager().
bool all_ordinary(const std::vector<OptionalTensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const auto& tensor) { return eager({pointer(tensor)}); });
}

py::dict build_facts() {
  py::dict facts;
  facts["torch"] = MRVAE_BUILD_TORCH;
  facts["compiler"] = MRVAE_BUILD_COMPILER;
  facts["flags"] = MRVAE_BUILD_FLAGS;
  facts["commit"] = MRVAE_BUILD_COMMIT;
  facts["cuda"] = MRVAE_BUILD_CUDA;  // and the next two: empty in a build without CUDA
  facts["architectures"] = MRVAE_BUILD_ARCHITECTURES;
  facts["nvcc_flags"] = MRVAE_BUILD_NVCC_FLAGS;
  return facts;
}

}  // namespace
}  // namespace mrvae

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The C++ core of mrvae_kernels: importing it registers the operators of torch.ops.mrvae.";
  m.def("build_facts", &mrvae::build_facts);
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  py::class_<mrvae::Bank>(m, "Bank")
      .def(py::init<std::vector<std::int64_t>, std::vector<std::int64_t>>())
      .def("gates", &mrvae::Bank::gates, unlocked)
      .def("gates_at", &mrvae::Bank::gates_at, unlocked);
  using Numbers = mrvae::GatedFold::Numbers;
  py::class_<mrvae::GatedFold, c10::intrusive_ptr<mrvae::GatedFold>>(m, "GatedFold")
      .def(py::init([](Numbers sizes, Numbers kinds, Numbers gate_at, Numbers shift_at, Numbers groups) {
        return c10::make_intrusive<mrvae::GatedFold>(std::move(sizes), std::move(kinds), std::move(gate_at),
                                                     std::move(shift_at), std::move(groups));
      }))
      .def("run", &mrvae::GatedFold::run, unlocked);
  m.def("ordinary", &mrvae::all_ordinary);
  m.def("sample_batch_norm", &mrvae::sample_batch_norm, unlocked);
  mrvae::define_layers(m);
  mrvae::define_entry(m);
}

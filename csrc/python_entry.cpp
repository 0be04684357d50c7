// The beginning of a multi-rate network's call: is this the call that was made last time, with another beta? Then its
// gates, in one go. It is asked once a step, when the caches hold other things: the less code, the better.
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/csrc/autograd/python_variable.h>

#include "python_layers.h"

namespace py = pybind11;

namespace mrvae {
namespace {

using Shape = std::optional<std::vector<std::int64_t>>;  // none for an argument that is no tensor

// A parameter that the plan folds together with the others: of which layer, and the names.
struct FoldedParameter {
  std::size_t layer;
  py::object weight, bias;
};

class Entry {
 public:
  // shapes: of the call's arguments; with one beta a sample the first tensor's says how many.
  // folds: (layer, weight's name, bias's name) as in the plan. low, high: the beta range.
  Entry(c10::intrusive_ptr<Stage> stage, c10::intrusive_ptr<GatedFold> plan, bool per_sample, std::vector<Shape> shapes,
        const std::vector<std::tuple<std::size_t, py::str, py::str>>& folds, double low, double high)
      : stage_(std::move(stage)), plan_(std::move(plan)), per_sample_(per_sample), shapes_(std::move(shapes)), low_(low),
        high_(high), version_(stage_->version) {
    for (const auto& [layer, weight, bias] : folds) folds_.push_back({layer, weight, bias});
  }

  // Whether the call is this one and the gates are on the stage now. places: (modules, name, layer) of each gated layer;
  // hosted: the classes that they may have; holders: (modules, name, module, its modules) of what they are in, which has
  // to be there still; parameters: those of the MultiRate.
  bool begin(const py::tuple& args, const py::handle& beta, const py::list& places, const py::handle& hosted,
             const py::list& holders, const py::dict& parameters) const {
    for (const auto& holder : holders) {
      PyObject* parts = holder.ptr();
      PyObject* module = PyDict_GetItem(PyTuple_GET_ITEM(parts, 0), PyTuple_GET_ITEM(parts, 1));
      if (module != PyTuple_GET_ITEM(parts, 2)) return false;
      const auto children = py::reinterpret_steal<py::object>(PyObject_GetAttrString(module, "_modules"));
      if (children.ptr() != PyTuple_GET_ITEM(parts, 3)) return false;
    }
    if (stage_->gates || stage_->version != version_ || !same(args)) return false;
    const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
    if (!(included - c10::default_included_set).empty() || at::SavedTensorDefaultHooks::get_hooks()) return false;
    const auto weight = tensor(parameters, "gate_weight"), bias = tensor(parameters, "gate_bias");
    if (!weight || !bias || !eager({&*weight, &*bias})) return false;
    std::vector<PyObject*> layers;
    for (const auto& place : places) {
      const auto pair = py::reinterpret_borrow<py::tuple>(place);
      PyObject* layer = PyDict_GetItem(PyTuple_GET_ITEM(pair.ptr(), 0), PyTuple_GET_ITEM(pair.ptr(), 1));
      if (layer == nullptr || layer != PyTuple_GET_ITEM(pair.ptr(), 2)) return false;
      if (PySet_Contains(hosted.ptr(), reinterpret_cast<PyObject*>(Py_TYPE(layer))) != 1) return false;
      layers.push_back(layer);
    }
    std::vector<Tensor> weights;
    std::vector<OptionalTensor> biases;
    for (const FoldedParameter& fold : folds_) {
      const auto own = py::reinterpret_steal<py::object>(PyObject_GetAttrString(layers[fold.layer], "_parameters"));
      if (!own) throw py::error_already_set();
      if (!PyDict_Check(own.ptr())) return false;
      PyObject *w = PyDict_GetItem(own.ptr(), fold.weight.ptr()), *b = PyDict_GetItem(own.ptr(), fold.bias.ptr());
      if (w == nullptr || !THPVariable_Check(w)) return false;
      weights.push_back(THPVariable_Unpack(w));
      biases.push_back(b == nullptr || !THPVariable_Check(b) ? std::nullopt : OptionalTensor(THPVariable_Unpack(b)));
    }
    const OptionalTensor eta = standardized_like(beta, *weight);
    if (!eta) return false;
    stage_->gates = plan_->run(*weight, *bias, *eta, weights, biases);
    return true;
  }

 private:
  static OptionalTensor tensor(const py::dict& parameters, const char* name) {
    PyObject* found = PyDict_GetItemString(parameters.ptr(), name);
    return found != nullptr && THPVariable_Check(found) ? OptionalTensor(THPVariable_Unpack(found)) : std::nullopt;
  }

  bool same(const py::tuple& args) const {
    if (args.size() != shapes_.size()) return false;
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      PyObject* argument = PyTuple_GET_ITEM(args.ptr(), i);
      if (THPVariable_Check(argument) != shapes_[i].has_value()) return false;
      if (shapes_[i] && !THPVariable_Unpack(argument).sizes().equals(*shapes_[i])) return false;
    }
    return true;
  }

  std::int64_t samples() const {
    for (const Shape& shape : shapes_) {
      if (shape && !shape->empty()) return shape->front();
    }
    return -1;
  }

  // eta of a beta within the range, and of as many betas as the plan is for
  OptionalTensor standardized_like(const py::handle& beta, const Tensor& weight) const {
    const auto dtype = gate_dtype(weight.scalar_type());
    if (PyFloat_CheckExact(beta.ptr()) || PyLong_CheckExact(beta.ptr())) {
      const double value = PyFloat_AsDouble(beta.ptr());
      if (PyErr_Occurred() != nullptr) {  // an integer beyond all floats
        PyErr_Clear();
        return std::nullopt;
      }
      if (per_sample_ || !(value >= low_ && value <= high_)) return std::nullopt;
      const auto options = weight.options().dtype(dtype).requires_grad(false);
      return at::scalar_tensor(standardized(value, low_, high_), options);
    }
    if (!THPVariable_CheckExact(beta.ptr()) || !weight.device().is_cpu()) return std::nullopt;
    const Tensor& values = THPVariable_Unpack(beta.ptr());
    if ((values.dim() == 1) != per_sample_ || (per_sample_ && values.size(0) != samples())) return std::nullopt;
    return standardized(values, low_, high_, dtype);
  }

  const c10::intrusive_ptr<Stage> stage_;
  const c10::intrusive_ptr<GatedFold> plan_;
  const bool per_sample_;
  const std::vector<Shape> shapes_;
  const double low_, high_;
  const std::int64_t version_;
  std::vector<FoldedParameter> folds_;
};

OptionalTensor standardized_as(const Tensor& beta, double low, double high, bool wide) {
  return standardized(beta, low, high, wide ? at::kDouble : at::kFloat);
}

}  // namespace

void define_entry(py::module_& m) {
  m.def("standardized", &standardized_as);
  py::class_<Entry>(m, "Entry")
      .def(py::init<c10::intrusive_ptr<Stage>, c10::intrusive_ptr<GatedFold>, bool, std::vector<Shape>,
                    std::vector<std::tuple<std::size_t, py::str, py::str>>, double, double>())
      .def("begin", &Entry::begin);
}

}  // namespace mrvae

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
  bool begin(PyObject* args, PyObject* beta, PyObject* places, PyObject* hosted, PyObject* holders,
             PyObject* parameters) const {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(holders); ++i) {
      PyObject* parts = PyList_GET_ITEM(holders, i);
      PyObject* module = item(PyTuple_GET_ITEM(parts, 0), PyTuple_GET_ITEM(parts, 1));
      if (module == nullptr || module != PyTuple_GET_ITEM(parts, 2)) return false;
      if (item(attributes(module), names().modules) != PyTuple_GET_ITEM(parts, 3)) return false;
    }
    if (stage_->gates || stage_->version != version_ || !same(args)) return false;
    const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
    if (!(included - c10::default_included_set).empty() || at::SavedTensorDefaultHooks::get_hooks()) return false;
    PyObject *w = item(parameters, names().gate_weight), *b = item(parameters, names().gate_bias);
    if (!is_tensor(w) || !is_tensor(b)) return false;
    const Tensor weight = THPVariable_Unpack(w), bias = THPVariable_Unpack(b);
    if (!eager({&weight, &bias})) return false;
    c10::SmallVector<PyObject*, 16> layers;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(places); ++i) {
      PyObject* parts = PyList_GET_ITEM(places, i);
      PyObject* layer = item(PyTuple_GET_ITEM(parts, 0), PyTuple_GET_ITEM(parts, 1));
      if (layer == nullptr || layer != PyTuple_GET_ITEM(parts, 2)) return false;
      if (PySet_Contains(hosted, reinterpret_cast<PyObject*>(Py_TYPE(layer))) != 1) return false;
      layers.push_back(layer);
    }
    std::vector<Tensor> weights;
    std::vector<OptionalTensor> biases;
    for (const FoldedParameter& fold : folds_) {
      PyObject* own = item(attributes(layers[fold.layer]), names().parameters);
      if (own == nullptr || !PyDict_Check(own)) return false;
      PyObject *folded = item(own, fold.weight.ptr()), *folded_bias = item(own, fold.bias.ptr());
      if (!is_tensor(folded)) return false;
      weights.push_back(THPVariable_Unpack(folded));
      biases.push_back(is_tensor(folded_bias) ? OptionalTensor(THPVariable_Unpack(folded_bias)) : std::nullopt);
    }
    const OptionalTensor eta = standardized_like(beta, weight);
    if (!eta) return false;
    stage_->gates = plan_->run(weight, bias, *eta, weights, biases);
    return true;
  }

 private:
  struct Names {
    PyObject *modules = interned("_modules"), *parameters = interned("_parameters"), *gate_weight = interned("gate_weight"),
             *gate_bias = interned("gate_bias");
  };
  static const Names& names() {
    static const Names instance;
    return instance;
  }

  static bool is_tensor(PyObject* object) { return object != nullptr && THPVariable_Check(object); }

  bool same(PyObject* args) const {
    if (PyTuple_GET_SIZE(args) != Py_ssize_t(shapes_.size())) return false;
    for (std::size_t i = 0; i < shapes_.size(); ++i) {
      PyObject* argument = PyTuple_GET_ITEM(args, Py_ssize_t(i));
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
  OptionalTensor standardized_like(PyObject* beta, const Tensor& weight) const {
    const auto dtype = gate_dtype(weight.scalar_type());
    if (PyFloat_CheckExact(beta) || PyLong_CheckExact(beta)) {
      const double value = PyFloat_AsDouble(beta);
      if (PyErr_Occurred() != nullptr) {  // an integer beyond all floats
        PyErr_Clear();
        return std::nullopt;
      }
      if (per_sample_ || !(value >= low_ && value <= high_)) return std::nullopt;
      const double eta = standardized(value, low_, high_);
      if (!weight.device().is_cpu()) return at::scalar_tensor(eta, weight.options().dtype(dtype).requires_grad(false));
      const Tensor result = fresh({}, dtype, weight);
      dtype == at::kDouble ? void(*result.mutable_data_ptr<double>() = eta)
                           : void(*result.mutable_data_ptr<float>() = float(eta));
      return result;
    }
    if (!THPVariable_CheckExact(beta) || !weight.device().is_cpu()) return std::nullopt;
    const Tensor& values = THPVariable_Unpack(beta);
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

// of the MultiRate's call: see Entry::begin
PyObject* begin(PyObject* self, PyObject* const* arguments) {
  const auto [args, beta, places, hosted, holders, parameters] =
      std::array{arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]};
  TORCH_CHECK_TYPE(PyTuple_Check(args) && PyList_Check(places) && PyAnySet_Check(hosted) && PyList_Check(holders) &&
                       PyDict_Check(parameters),
                   "expected a tuple of arguments, beta, lists of places, a set of classes, a list of holders and a "
                   "dictionary of parameters");
  return PyBool_FromLong(held<Entry>(self)->begin(args, beta, places, hosted, holders, parameters));
}

OptionalTensor standardized_as(const Tensor& beta, double low, double high, bool wide) {
  return standardized(beta, low, high, wide ? at::kDouble : at::kFloat);
}

// of betas: True or False, and None where it could not be told
PyObject* positive(PyObject*, PyObject* const* arguments) {
  if (!THPVariable_CheckExact(arguments[0])) Py_RETURN_NONE;
  const std::optional<bool> found = all_positive(THPVariable_Unpack(arguments[0]));
  if (!found) Py_RETURN_NONE;
  return PyBool_FromLong(*found);
}

}  // namespace

void define_entry(py::module_& m) {
  m.def("standardized", &standardized_as);
  m.add_object("all_positive", fast_function<positive, 1>("all_positive"));
  py::class_<Entry>(m, "Entry")
      .def(py::init<c10::intrusive_ptr<Stage>, c10::intrusive_ptr<GatedFold>, bool, std::vector<Shape>,
                    std::vector<std::tuple<std::size_t, py::str, py::str>>, double, double>())
      .def_property_readonly("begin", [](const py::object& entry) { return fast_function<begin, 6>("begin", entry.ptr()); });
}

}  // namespace mrvae

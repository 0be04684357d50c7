// Calls of hosted layers, one by one and in an nn.Sequential.
//
// A Sequential's own loop costs a few microseconds a module, most of them nn.Module.__call__ looking for hooks; its
// activations are passes of their own. Here a layer takes the activation that follows it into its epilogue. A module that
// is not known, or that has hooks, is called as Python would call it.
#include "python_layers.h"

#include <torch/csrc/autograd/python_variable.h>

namespace py = pybind11;

namespace mrvae {
namespace {

// Module types and names that are looked up at every call. They live as long as the process.
struct Known {
  PyObject* hooks[4] = {interned("_forward_hooks"), interned("_forward_pre_hooks"), interned("_backward_hooks"),
                        interned("_backward_pre_hooks")};
  PyObject *forward = interned("forward"), *compiled = interned("_compiled_call_impl"), *share = interned("_share"),
           *direct = interned("_direct"),
           *parameters = interned("_parameters"), *weight = interned("weight"), *bias = interned("bias");
  std::vector<PyObject*> global_hooks;
  std::vector<std::pair<PyTypeObject*, Activation>> activations;
  PyTypeObject* layer = nullptr;  // the Python type of HostedLayer
};

Known& known() {
  static Known instance;
  return instance;
}

// No hook, no forward or compiled call of its own: calling the module is calling its class's forward.
bool plain(PyObject* dictionary) {
  const Known& k = known();
  for (PyObject* hook : k.hooks) {
    PyObject* found = item(dictionary, hook);
    if (found == nullptr || !PyDict_Check(found) || PyDict_Size(found) != 0) return false;
  }
  PyObject* compiled = item(dictionary, k.compiled);
  return item(dictionary, k.forward) == nullptr && (compiled == nullptr || compiled == Py_None);
}

bool hooked_everywhere() {
  for (PyObject* hooks : known().global_hooks) {
    if (PyDict_Size(hooks) != 0) return true;
  }
  return false;
}

bool is_tensor(PyObject* object) { return object != nullptr && THPVariable_CheckExact(object); }

// The layer's result, or None where it cannot be called straight away.
OptionalTensor run(PyObject* direct, PyObject* parameters, const Tensor& x, Activation activation) {
  if (parameters == nullptr || !PyDict_Check(parameters)) return std::nullopt;
  PyObject *weight = item(parameters, known().weight), *bias = item(parameters, known().bias);
  if (weight == nullptr || !THPVariable_Check(weight) || bias == nullptr) return std::nullopt;
  if (bias != Py_None && !THPVariable_Check(bias)) return std::nullopt;
  const auto layer = c10::intrusive_ptr<HostedLayer>::reclaim_copy(held<HostedLayer>(direct));  // outlives what holds it
  const Tensor w = THPVariable_Unpack(weight);
  const OptionalTensor b = bias == Py_None ? std::nullopt : OptionalTensor(THPVariable_Unpack(bias));
  const py::gil_scoped_release unlocked;
  return layer->run(x, w, b, activation);
}

// of a HostedLayer, a layer's parameters and x
PyObject* run_layer(PyObject*, PyObject* const* arguments) {
  PyObject *direct = arguments[0], *x = arguments[2];
  TORCH_CHECK_TYPE(Py_TYPE(direct) == known().layer, "expected a HostedLayer; got ", Py_TYPE(direct)->tp_name);
  if (!is_tensor(x)) Py_RETURN_NONE;
  const OptionalTensor y = run(direct, arguments[1], THPVariable_Unpack(x), Activation::None);
  if (!y.has_value()) Py_RETURN_NONE;
  return THPVariable_Wrap(*y);
}

// The activation that a module is, Activation::None for others.
Activation activation_of(PyObject* module) {
  for (const auto& [type, activation] : known().activations) {
    if (Py_TYPE(module) == type) return plain(attributes(module)) ? activation : Activation::None;
  }
  return Activation::None;
}

// The result of calling this gated layer with x and then, if it is an activation that the epilogue can take, `next`,
// which may be null; `both` says whether it was. None where Python has to call the layer.
OptionalTensor call(PyObject* layer, PyObject* x, PyObject* next, bool& both) {
  PyObject *dictionary = attributes(layer), *direct = item(dictionary, known().direct);
  const bool ready = direct != nullptr && Py_TYPE(direct) == known().layer;
  if (!ready || item(dictionary, known().share) != Py_None) return std::nullopt;
  if (!is_tensor(x) || !plain(dictionary)) return std::nullopt;
  const Activation activation = next == nullptr ? Activation::None : activation_of(next);
  both = activation != Activation::None;
  return run(direct, item(dictionary, known().parameters), THPVariable_Unpack(x), activation);
}

// of a gated layer and x
PyObject* call_layer(PyObject*, PyObject* const* arguments) {
  bool both = false;
  const OptionalTensor y = hooked_everywhere() ? std::nullopt : call(arguments[0], arguments[1], nullptr, both);
  if (!y.has_value()) Py_RETURN_NONE;
  return THPVariable_Wrap(*y);
}

// of an nn.Sequential's modules and x
PyObject* run_sequential(PyObject*, PyObject* const* arguments) {
  TORCH_CHECK_TYPE(PyDict_Check(arguments[0]), "expected a dictionary of modules; got ", Py_TYPE(arguments[0])->tp_name);
  c10::SmallVector<py::object, 16> children;
  PyObject *key, *child;
  for (Py_ssize_t at = 0; PyDict_Next(arguments[0], &at, &key, &child);) {
    children.push_back(py::reinterpret_borrow<py::object>(child));
  }
  auto x = py::reinterpret_borrow<py::object>(arguments[1]);
  const bool by_python = hooked_everywhere();
  for (std::size_t i = 0; i < children.size(); ++i) {
    PyObject* module = children[i].ptr();
    PyObject* next = i + 1 < children.size() ? children[i + 1].ptr() : nullptr;
    bool both = false;
    if (OptionalTensor y = by_python ? std::nullopt : call(module, x.ptr(), next, both)) {
      x = py::reinterpret_steal<py::object>(THPVariable_Wrap(*std::move(y)));
      i += both;
      continue;
    }
    PyObject* result = PyObject_CallFunctionObjArgs(module, x.ptr(), nullptr);
    if (result == nullptr) throw py::error_already_set();
    x = py::reinterpret_steal<py::object>(result);
  }
  return x.release().ptr();
}

// activations: from a class of torch.nn without parameters to its name
void set_known_modules(const py::dict& activations, const py::list& global_hooks) {
  for (const auto& [type, text] : activations) {
    known().activations.emplace_back(reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()),
                                     parse_activation(py::cast<std::string>(text)));
  }
  for (const auto& hooks : global_hooks) known().global_hooks.push_back(hooks.inc_ref().ptr());
}

HostedLayer::Product convolution(const std::vector<std::int64_t>& stride, const std::vector<std::int64_t>& padding,
                                 const std::vector<std::int64_t>& dilation, bool transposed,
                                 const std::vector<std::int64_t>& output_padding, std::int64_t groups) {
  return ConvolutionProduct(stride, padding, dilation, transposed, output_padding, groups);
}

using Numbers = std::vector<std::int64_t>;
using Geometry = std::tuple<Numbers, Numbers, Numbers, bool, Numbers, std::int64_t>;

c10::intrusive_ptr<HostedLayer> hosted_layer(const c10::intrusive_ptr<Stage>& stage, std::int64_t gate,
                                             std::int64_t shift, std::int64_t inputs, const std::string& strategy,
                                             const std::optional<Geometry>& geometry) {
  return c10::make_intrusive<HostedLayer>(
      stage, gate, shift, inputs, parse_strategy(strategy),
      geometry ? std::apply(convolution, *geometry) : HostedLayer::Product(LinearProduct()));
}

}  // namespace

void define_layers(py::module_& m) {
  py::class_<StepGates, c10::intrusive_ptr<StepGates>>(m, "StepGates")
      .def("variable", &StepGates::variable)
      .def_readonly("weights", &StepGates::weights)
      .def_readonly("biases", &StepGates::biases);
  py::class_<Stage, c10::intrusive_ptr<Stage>>(m, "Stage")
      .def(py::init([] { return c10::make_intrusive<Stage>(); }))
      .def_readwrite("gates", &Stage::gates)
      .def_readwrite("version", &Stage::version);
  py::class_<HostedLayer, c10::intrusive_ptr<HostedLayer>>(m, "HostedLayer")
      .def(py::init(&hosted_layer))
      .def_readonly("stage", &HostedLayer::stage)
      .def_readonly("gate", &HostedLayer::gate)
      .def_readonly("shift", &HostedLayer::shift)
      .def_readonly("inputs", &HostedLayer::inputs)
      .def_property_readonly("strategy", [](const HostedLayer& layer) {
        return layer.strategy == Strategy::Fold ? "fold" : "epilogue";
      });
  known().layer = reinterpret_cast<PyTypeObject*>(m.attr("HostedLayer").ptr());
  m.def("set_known_modules", &set_known_modules);
  m.add_object("call_layer", fast_function<call_layer, 2>("call_layer"));
  m.add_object("run_layer", fast_function<run_layer, 3>("run_layer"));
  m.add_object("run_sequential", fast_function<run_sequential, 2>("run_sequential"));
}

}  // namespace mrvae

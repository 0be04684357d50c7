// The layers of a multi-rate network as Python calls them; see python_layers.cpp and python_entry.cpp.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "hosted_layer.h"

namespace mrvae {

// A name that is looked up at every call; it lives as long as the process.
inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

// The object's __dict__, which it keeps alive; none for one without.
inline PyObject* attributes(PyObject* object) {
  PyObject* dictionary = PyObject_GenericGetDict(object, nullptr);
  dictionary == nullptr ? PyErr_Clear() : Py_DECREF(dictionary);
  return dictionary;
}

inline PyObject* item(PyObject* dictionary, PyObject* key) {
  return dictionary == nullptr ? nullptr : PyDict_GetItemWithError(dictionary, key);
}

// The C++ object in an instance of exactly its class. pybind11's cast looks the class up by the name of T, twice a call.
template <class T>
T* held(PyObject* object) {
  return reinterpret_cast<pybind11::detail::instance*>(object)->get_value_and_holder().value_ptr<T>();
}

// A function of this many positional arguments, called without pybind11's reading of them: 0.4 us a call.
using FastCall = PyObject* (*)(PyObject* self, PyObject* const* arguments);
template <FastCall function, Py_ssize_t count>
PyObject* checked_call(PyObject* self, PyObject* const* arguments, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(given == count, "got ", given, " arguments; expected ", count);
  return function(self, arguments);
  END_HANDLE_TH_ERRORS
}
template <FastCall function, Py_ssize_t count>
pybind11::object fast_function(const char* name, PyObject* self = nullptr) {
  const auto any = reinterpret_cast<void (*)()>(&checked_call<function, count>);  // no warning about its arguments
  static PyMethodDef definition = {name, reinterpret_cast<PyCFunction>(any), METH_FASTCALL, nullptr};
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, self));
}

void define_layers(pybind11::module_& module);
void define_entry(pybind11::module_& module);

}  // namespace mrvae

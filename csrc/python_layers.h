// The layers of a multi-rate network as Python calls them; see python_layers.cpp and python_entry.cpp.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "hosted_layer.h"

namespace mrvae {

void define_layers(pybind11::module_& module);
void define_entry(pybind11::module_& module);

}  // namespace mrvae

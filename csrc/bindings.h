// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/dtype.h"
#include "cpu/glu.h"

namespace py = pybind11;
using namespace py::literals;
using Address = std::uintptr_t;
using Size = std::int64_t;
using fuserl::Dtype;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// Enumerators arrive by the names that the ops use.
fuserl::Activation activation_of(const std::string& name);

void bind_advantages(py::module_& module);
void bind_decode_attention(py::module_& module);
void bind_decoder(py::module_& module);
void bind_glu(py::module_& module);
void bind_losses(py::module_& module);
void bind_norms(py::module_& module);
void bind_product(py::module_& module);
void bind_rotary(py::module_& module);
void bind_sampling(py::module_& module);

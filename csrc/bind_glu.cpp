// Python's view of cpu/glu.h.

#include "bindings.h"

using fuserl::Activation;

Activation activation_of(const std::string& name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "relu") return Activation::kRelu;
    throw py::value_error("no activation is named " + name);
}

namespace {

void forward(const std::string& activation, Dtype dtype, Address gate_up, Size num_rows, Size size,
             Size row_stride, Address out, int num_threads) {
    const fuserl::Glu task{activation_of(activation), dtype,   at<const void>(gate_up), num_rows,
                           size,                      row_stride, nullptr,              0,
                           at<void>(out)};
    const py::gil_scoped_release unlocked;
    fuserl::glu_forward(task, num_threads);
}

void backward(const std::string& activation, Dtype dtype, Address gate_up, Size num_rows, Size size,
              Size row_stride, Address grad, Size grad_stride, Address out, int num_threads) {
    const fuserl::Glu task{activation_of(activation),
                           dtype,
                           at<const void>(gate_up),
                           num_rows,
                           size,
                           row_stride,
                           at<const void>(grad),
                           grad_stride,
                           at<void>(out)};
    const py::gil_scoped_release unlocked;
    fuserl::glu_backward(task, num_threads);
}

}  // namespace

void bind_glu(py::module_& module) {
    module.def("glu_forward", &forward, py::kw_only(), "activation"_a, "dtype"_a, "gate_up"_a,
               "num_rows"_a, "size"_a, "row_stride"_a, "out"_a, "num_threads"_a);
    module.def("glu_backward", &backward, py::kw_only(), "activation"_a, "dtype"_a, "gate_up"_a,
               "num_rows"_a, "size"_a, "row_stride"_a, "grad"_a, "grad_stride"_a, "out"_a,
               "num_threads"_a);
}

// Python's view of cpu/norms.h.

#include "bindings.h"

#include "cpu/norms.h"

namespace {

void norm_forward(Address rows, Dtype dtype, Size num_rows, Size hidden_size, Size inner_rows,
                  Size outer_stride, Size inner_stride, Address weight, Dtype weight_dtype,
                  float weight_offset, bool centered, int num_threads, Address bias,
                  Dtype bias_dtype, Address residual, double eps, Address y, Address summed,
                  Address stats) {
    fuserl::norm_forward(
        {{at<const void>(rows), dtype, num_rows, hidden_size, inner_rows, outer_stride,
          inner_stride, at<const void>(weight), weight_dtype, weight_offset, centered},
         at<const void>(bias), bias_dtype, at<const void>(residual), eps, at<void>(y),
         at<void>(summed), at<float>(stats)},
        num_threads);
}

void norm_backward(Address rows, Dtype dtype, Size num_rows, Size hidden_size, Size inner_rows,
                   Size outer_stride, Size inner_stride, Address weight, Dtype weight_dtype,
                   float weight_offset, bool centered, int num_threads, Address stats,
                   Address grad_y, Address grad_summed, Address grad_x, Address grad_vectors) {
    fuserl::norm_backward(
        {{at<const void>(rows), dtype, num_rows, hidden_size, inner_rows, outer_stride,
          inner_stride, at<const void>(weight), weight_dtype, weight_offset, centered},
         at<const float>(stats), at<const void>(grad_y), at<const void>(grad_summed),
         at<void>(grad_x), at<float>(grad_vectors)},
        num_threads);
}

}  // namespace

void bind_norms(py::module_& module) {
    module.def("norm_forward", &norm_forward, py::kw_only(), "rows"_a, "dtype"_a, "num_rows"_a,
               "hidden_size"_a, "inner_rows"_a, "outer_stride"_a, "inner_stride"_a, "weight"_a,
               "weight_dtype"_a, "weight_offset"_a, "centered"_a, "num_threads"_a, "bias"_a,
               "bias_dtype"_a, "residual"_a, "eps"_a, "y"_a, "summed"_a, "stats"_a, Unlocked());
    module.def("norm_backward", &norm_backward, py::kw_only(), "rows"_a, "dtype"_a, "num_rows"_a,
               "hidden_size"_a, "inner_rows"_a, "outer_stride"_a, "inner_stride"_a, "weight"_a,
               "weight_dtype"_a, "weight_offset"_a, "centered"_a, "num_threads"_a, "stats"_a,
               "grad_y"_a, "grad_summed"_a, "grad_x"_a, "grad_vectors"_a, Unlocked());
}

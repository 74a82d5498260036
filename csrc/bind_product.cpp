// Python's view of cpu/product.h.

#include "bindings.h"
#include "cpu/product.h"

namespace {

void pack_weight(Dtype dtype, Address weight, Size num_outputs, Size num_inputs, Size row_stride,
                 Size column_stride, Address panels, int num_threads) {
    fuserl::pack_weight({at<const void>(panels), dtype, num_outputs, num_inputs},
                        at<const void>(weight), row_stride, column_stride, num_threads);
}

Size packed_bytes(Dtype dtype, Size num_outputs, Size num_inputs) {
    return fuserl::PackedWeight{nullptr, dtype, num_outputs, num_inputs}.num_bytes();
}

void product(Address rows, Size num_rows, Size row_stride, Size input_stride, Address panels,
             Dtype dtype, Size num_outputs, Size num_inputs, Address bias, Address out, Dtype out_dtype,
             Size out_stride, int num_threads) {
    fuserl::product({at<const void>(rows), num_rows, row_stride, input_stride,
                     {at<const void>(panels), dtype, num_outputs, num_inputs},
                     at<const void>(bias), at<void>(out), out_dtype, out_stride},
                    num_threads);
}

}  // namespace

void bind_product(py::module_& module) {
    module.def("packed_bytes", &packed_bytes, "dtype"_a, "num_outputs"_a, "num_inputs"_a);
    module.def("pack_weight", &pack_weight, py::kw_only(), "dtype"_a, "weight"_a, "num_outputs"_a,
               "num_inputs"_a, "row_stride"_a, "column_stride"_a, "panels"_a, "num_threads"_a, Unlocked());
    module.def("product", &product, py::kw_only(), "rows"_a, "num_rows"_a, "row_stride"_a,
               "input_stride"_a, "panels"_a, "dtype"_a, "num_outputs"_a, "num_inputs"_a, "bias"_a, "out"_a,
               "out_dtype"_a, "out_stride"_a, "num_threads"_a, Unlocked());
}

// Python's view of the CPU kernels: pointers arrive as integers, arguments by name, and the GIL is
// released while a kernel runs. Checks and allocation are Python's.

#include "bindings.h"

#include "cpu/instruction_set.h"
#include "cpu/large_pages.h"
#include "cpu/token_logprobs.h"

namespace {

fuserl::Rows rows_of(Address logits, Dtype dtype, Size num_rows, Size vocab_size, Size row_stride,
                     Address token_ids, Address temperatures, double temperature, float softcap,
                     Address loss_mask) {
    return {at<const void>(logits),
            dtype,
            num_rows,
            vocab_size,
            row_stride,
            at<const std::int64_t>(token_ids),
            at<const float>(temperatures),
            temperature,
            softcap,
            at<const bool>(loss_mask)};
}

void forward(Address logits, Dtype dtype, Size num_rows, Size vocab_size, Size row_stride,
             Address token_ids, Address temperatures, double temperature, float softcap,
             Address loss_mask, Address logprobs, Address entropy, Address stats, int num_threads) {
    fuserl::token_logprobs_forward(
        {rows_of(logits, dtype, num_rows, vocab_size, row_stride, token_ids, temperatures,
                 temperature, softcap, loss_mask),
         at<float>(logprobs), at<float>(entropy), at<float>(stats)},
        num_threads);
}

void backward(Address logits, Dtype dtype, Size num_rows, Size vocab_size, Size row_stride,
              Address token_ids, Address temperatures, double temperature, float softcap,
              Address loss_mask, Address stats, Address entropy, Address grad_logprobs,
              Address grad_entropy, Address out, Dtype out_dtype, Size out_stride, bool out_is_new,
              int num_threads) {
    fuserl::token_logprobs_backward(
        {rows_of(logits, dtype, num_rows, vocab_size, row_stride, token_ids, temperatures,
                 temperature, softcap, loss_mask),
         at<const float>(stats), at<const float>(entropy), at<const float>(grad_logprobs),
         at<const float>(grad_entropy), at<void>(out), out_dtype, out_stride, out_is_new},
        num_threads);
}

void advise_large_pages(Address memory, Size num_bytes) {
    fuserl::advise_large_pages(at<void>(memory), num_bytes);
}

py::dict build_info() {
    return py::dict("compiler"_a = __VERSION__, "instructions"_a = fuserl::instruction_set());
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    py::enum_<Dtype>(module, "Dtype")
        .value("float32", Dtype::kFloat32)
        .value("bfloat16", Dtype::kBFloat16)
        .value("float16", Dtype::kFloat16);
    module.def("build_info", &build_info);
    module.def("advise_large_pages", &advise_large_pages, "memory"_a, "num_bytes"_a);
    module.def("set_instruction_set", &fuserl::set_instruction_set, "name"_a);
    module.def("token_logprobs_forward", &forward, py::kw_only(), "logits"_a, "dtype"_a,
               "num_rows"_a, "vocab_size"_a, "row_stride"_a, "token_ids"_a, "temperatures"_a,
               "temperature"_a, "softcap"_a, "loss_mask"_a, "logprobs"_a, "entropy"_a, "stats"_a,
               "num_threads"_a, Unlocked());
    module.def("token_logprobs_backward", &backward, py::kw_only(), "logits"_a, "dtype"_a,
               "num_rows"_a, "vocab_size"_a, "row_stride"_a, "token_ids"_a, "temperatures"_a,
               "temperature"_a, "softcap"_a, "loss_mask"_a, "stats"_a, "entropy"_a,
               "grad_logprobs"_a, "grad_entropy"_a, "out"_a, "out_dtype"_a, "out_stride"_a,
               "out_is_new"_a, "num_threads"_a, Unlocked());
    bind_advantages(module);
    bind_decode_attention(module);
    bind_decoder(module);
    bind_glu(module);
    bind_losses(module);
    bind_norms(module);
    bind_product(module);
    bind_rotary(module);
    bind_sampling(module);
}

// Python's view of the GPU kernels: as ../bindings.cpp, in a module of its own, so that the CPU
// kernels never need CUDA. Nothing here waits for the device.

#include "../bindings.h"

#include "sampling.h"

namespace {

void sample_tokens(Address logits, Dtype dtype, Size num_rows, Size vocab_size, Size row_stride,
                   double temperature, Size top_k, double top_p, double min_p, std::uint64_t seed,
                   Address request_ids, Address positions, Address token_ids, Address logprobs,
                   Address truncated_logprobs, int device, Address stream) {
    fuserl::cuda::sample_tokens(
        {at<const void>(logits), dtype, num_rows, vocab_size, row_stride, temperature, top_k, top_p,
         min_p, seed, at<const std::int64_t>(request_ids), at<const std::int64_t>(positions),
         at<std::int64_t>(token_ids), at<float>(logprobs), at<float>(truncated_logprobs)},
        device, reinterpret_cast<cudaStream_t>(stream));
}

py::dict build_info() {
    return py::dict("CUDA"_a = std::to_string(CUDART_VERSION / 1000) + "." +
                              std::to_string(CUDART_VERSION % 1000 / 10),
                    "for"_a = FUSERL_ARCHITECTURES);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    py::enum_<Dtype>(module, "Dtype", py::module_local())  // the CPU kernels' module has it too
        .value("float32", Dtype::kFloat32)
        .value("bfloat16", Dtype::kBFloat16)
        .value("float16", Dtype::kFloat16);
    module.def("build_info", &build_info);
    module.def("sample_tokens", &sample_tokens, py::kw_only(), "logits"_a, "dtype"_a, "num_rows"_a,
               "vocab_size"_a, "row_stride"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
               "seed"_a, "request_ids"_a, "positions"_a, "token_ids"_a, "logprobs"_a,
               "truncated_logprobs"_a, "device"_a, "stream"_a, Unlocked());
}

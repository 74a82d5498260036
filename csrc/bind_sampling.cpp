// Python's view of cpu/sampling.h.

#include "bindings.h"

#include "cpu/sampling.h"

namespace {

void sample_tokens(Address logits, Dtype dtype, Size num_rows, Size vocab_size, Size row_stride,
                   double temperature, Size top_k, double top_p, double min_p, std::uint64_t seed,
                   Address request_ids, Address positions, Address token_ids, Address logprobs,
                   Address truncated_logprobs, int num_threads) {
    fuserl::sample_tokens(
        {at<const void>(logits), dtype, num_rows, vocab_size, row_stride, temperature, top_k, top_p,
         min_p, seed, at<const std::int64_t>(request_ids), at<const std::int64_t>(positions),
         at<std::int64_t>(token_ids), at<float>(logprobs), at<float>(truncated_logprobs)},
        num_threads);
}

void cap_logits(Address logits, Size num_rows, Size vocab_size, float softcap, int num_threads) {
    fuserl::cap_logits(at<float>(logits), num_rows, vocab_size, softcap, num_threads);
}

}  // namespace

void bind_sampling(py::module_& module) {
    module.def("sample_tokens", &sample_tokens, py::kw_only(), "logits"_a, "dtype"_a, "num_rows"_a,
               "vocab_size"_a, "row_stride"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
               "seed"_a, "request_ids"_a, "positions"_a, "token_ids"_a, "logprobs"_a,
               "truncated_logprobs"_a, "num_threads"_a, Unlocked());
    module.def("cap_logits", &cap_logits, py::kw_only(), "logits"_a, "num_rows"_a, "vocab_size"_a,
               "softcap"_a, "num_threads"_a, Unlocked());
}

#include "token_logprobs.h"

#include <stdexcept>

#include "kernel_functions.h"
#include "large_pages.h"
#include "parallel.h"

namespace fuserl {

void token_logprobs_forward(const Forward& task, int num_threads) {
    const auto forward = kernel_functions().rows.forward;
    parallel_rows(task.rows.num_rows, task.rows.vocab_size, num_threads,
                  [&](std::int64_t first, std::int64_t last) { forward(task, first, last); });
}

void token_logprobs_backward(const Backward& task, int num_threads) {
    if (task.out_dtype != task.rows.dtype &&
        !(task.rows.dtype == Dtype::kFloat32 && task.out_dtype == Dtype::kBFloat16))
        throw std::invalid_argument("out must have the dtype of logits, or bfloat16 for float32");
    if (task.out_is_new)
        advise_large_pages(task.out, task.rows.num_rows * task.out_stride * size_of(task.out_dtype));
    const auto backward = kernel_functions().rows.backward;
    parallel_rows(task.rows.num_rows, task.rows.vocab_size, num_threads,
                  [&](std::int64_t first, std::int64_t last) { backward(task, first, last); });
}

}  // namespace fuserl

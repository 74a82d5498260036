#include "token_logprobs.h"

#include <stdexcept>

#include "kernel_functions.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fuserl {
namespace {

// The system hands out new memory by the page, and most of a gradient's time would go there: ask
// for pages of 2 MB. It is advice; where the system does not take it, the pages stay small.
void advise_large_pages(const Backward& task) {
#if defined(__linux__)
    constexpr std::uintptr_t kPage = 2 << 20;
    const std::int64_t size = task.out_dtype == Dtype::kFloat32 ? 4 : 2;
    const auto start = reinterpret_cast<std::uintptr_t>(task.out);
    const std::uintptr_t stop = start + task.rows.num_rows * task.out_stride * size;
    const std::uintptr_t first = (start + kPage - 1) / kPage * kPage, last = stop / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)task;
#endif
}

}  // namespace

void token_logprobs_forward(const Forward& task, int num_threads) {
    const auto forward = kernel_functions().rows.forward;
    parallel_rows(task.rows.num_rows, task.rows.vocab_size, num_threads,
                  [&](std::int64_t first, std::int64_t last) { forward(task, first, last); });
}

void token_logprobs_backward(const Backward& task, int num_threads) {
    if (task.out_dtype != task.rows.dtype &&
        !(task.rows.dtype == Dtype::kFloat32 && task.out_dtype == Dtype::kBFloat16))
        throw std::invalid_argument("out must have the dtype of logits, or bfloat16 for float32");
    if (task.out_is_new) advise_large_pages(task);
    const auto backward = kernel_functions().rows.backward;
    parallel_rows(task.rows.num_rows, task.rows.vocab_size, num_threads,
                  [&](std::int64_t first, std::int64_t last) { backward(task, first, last); });
}

}  // namespace fuserl

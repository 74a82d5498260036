#include "glu.h"

#include "kernel_functions.h"
#include "large_pages.h"
#include "parallel.h"

namespace fuserl {

void glu_forward(const Glu& task, int num_threads) {
    advise_large_pages(task.out, task.num_rows * task.size * size_of(task.dtype));
    const auto forward = kernel_functions().glu.forward;
    parallel_rows(task.num_rows, 2 * task.size, num_threads,
                  [&](std::int64_t first, std::int64_t last) { forward(task, first, last); });
}

void glu_backward(const Glu& task, int num_threads) {
    advise_large_pages(task.out, 2 * task.num_rows * task.size * size_of(task.dtype));
    const auto backward = kernel_functions().glu.backward;
    parallel_rows(task.num_rows, 2 * task.size, num_threads,
                  [&](std::int64_t first, std::int64_t last) { backward(task, first, last); });
}

}  // namespace fuserl

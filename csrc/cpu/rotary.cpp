#include "rotary.h"

#include <vector>

#include "kernel_functions.h"
#include "large_pages.h"
#include "parallel.h"

namespace fuserl {

void rotary_forward(const Rotary& task, int num_threads) {
    const HeadSizes& sizes = task.sizes;
    const std::int64_t head_bytes = sizes.num_tokens * sizes.head_dim * size_of(task.dtype);
    advise_large_pages(task.query.data, sizes.num_heads * head_bytes);
    if (!task.slots) {  // memory of this call, not a cache
        advise_large_pages(task.key.data, sizes.num_kv_heads * head_bytes);
        advise_large_pages(task.value.data, sizes.num_kv_heads * head_bytes);
    }
    const auto forward = kernel_functions().rotary.forward;
    parallel_rows(sizes.num_tokens, sizes.row(), num_threads,
                  [&](std::int64_t first, std::int64_t last) { forward(task, first, last); });
}

void rotary_backward(const RotaryBackward& task, int num_threads) {
    advise_large_pages(task.grad_qkv,
                       task.sizes.num_tokens * task.sizes.row() * size_of(task.dtype));
    const auto backward = kernel_functions().rotary.backward;
    const std::int64_t num_parts = (task.sizes.num_tokens + kPartTokens - 1) / kPartTokens;
    const std::int64_t part_size = 2 * task.sizes.head_dim;
    std::vector<float> partials(
        task.grad_weights ? static_cast<std::size_t>(num_parts * part_size) : 0);
    parallel_rows(num_parts, kPartTokens * task.sizes.row(), num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      backward(task, first, last, partials.data());
                  });
    if (!task.grad_weights) return;
    for (std::int64_t column = 0; column < part_size; ++column) {
        double sum = 0.0;
        for (std::int64_t part = 0; part < num_parts; ++part)
            sum += partials[static_cast<std::size_t>(part * part_size + column)];
        task.grad_weights[column] = static_cast<float>(sum);
    }
}

}  // namespace fuserl

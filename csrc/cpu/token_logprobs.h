// Rows of log_softmax(logits / temperature) at one token each: forward and backward on the CPU.
//
// float32 or bf16 logits [num_rows, vocab_size] with any row stride and unit column stride;
// arithmetic in float32, row sums in double. A row's result does not depend on the number of rows
// or threads. Formulas: kernels/fuserl_kernels/reference/logprobs.py.
#pragma once

#include <cstdint>

namespace fuserl {

struct Rows {
    const void* logits;
    bool is_bf16;
    std::int64_t num_rows;
    std::int64_t vocab_size;
    std::int64_t row_stride;          // in elements
    const std::int64_t* token_ids;    // [num_rows]; outside [0, vocab_size) gives NaN
    const float* temperatures;        // [num_rows], or null for `temperature`
    double temperature;
    const bool* loss_mask;            // [num_rows], or null; a masked row is never read
};

// logprobs [num_rows]; entropy [num_rows] or null; stats [2, num_rows] = (max, log_sum).
void token_logprobs_forward(const Rows& rows, float* logprobs, float* entropy, float* stats,
                            int num_threads);

// out [num_rows, vocab_size] in the dtype of the logits, and may be the logits themselves;
// entropy and grad_entropy [num_rows], or both null.
void token_logprobs_backward(const Rows& rows, const float* stats, const float* entropy,
                             const float* grad_logprobs, const float* grad_entropy, void* out,
                             std::int64_t out_stride, int num_threads);

// "avx512", "avx2" or "baseline": what the functions above use on this machine.
const char* instruction_set();

}  // namespace fuserl

// Rows of log_softmax(x / temperature) at one token each, with x = softcap * tanh(logits / softcap)
// or the logits themselves: forward and backward on the CPU.
//
// Logits [num_rows, vocab_size] with any row stride and unit column stride; arithmetic in float32,
// row sums in double. A row's result depends on nothing but the row and the instruction set, so
// the number of rows and threads changes no bit. Formulas:
// kernels/fuserl_kernels/reference/logprobs.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fuserl {

struct Rows {
    const void* logits;
    Dtype dtype;
    std::int64_t num_rows;
    std::int64_t vocab_size;
    std::int64_t row_stride;        // in elements
    const std::int64_t* token_ids;  // [num_rows]; outside [0, vocab_size) gives NaN
    const float* temperatures;      // [num_rows], or null for `temperature`
    double temperature;
    float softcap;                  // 0 for none
    const bool* loss_mask;          // [num_rows], or null; a masked row is never read
};

struct Forward {
    Rows rows;
    float* logprobs;  // [num_rows]
    float* entropy;   // [num_rows], or null
    float* stats;     // [2, num_rows]: largest x, log of sum_v exp((x_v - largest) / temperature)
};

struct Backward {
    Rows rows;
    const float* stats;
    const float* entropy;        // [num_rows], or null with grad_entropy
    const float* grad_logprobs;  // [num_rows]
    const float* grad_entropy;   // [num_rows], or null
    // [num_rows, vocab_size]: the gradient of the logits, in their dtype, and perhaps in their
    // place; or bfloat16 for float32 logits, perhaps with each row starting where its logits do.
    void* out;
    Dtype out_dtype;
    std::int64_t out_stride;  // in elements of out
    bool out_is_new;          // memory that nobody has touched: worth asking for large pages
};

// Throw std::invalid_argument for a pair of dtypes that has no implementation.
void token_logprobs_forward(const Forward& task, int num_threads);
void token_logprobs_backward(const Backward& task, int num_threads);

// What instruction sets have versions of: each does the rows [first, last).
struct RowFunctions {
    void (*forward)(const Forward& task, std::int64_t first, std::int64_t last);
    void (*backward)(const Backward& task, std::int64_t first, std::int64_t last);
};

}  // namespace fuserl

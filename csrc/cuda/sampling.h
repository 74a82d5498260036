// One sampled token a row on the GPU, with its log-probability before and after truncation.
//
// Logits [num_rows, vocab_size] in device memory, with any row stride and unit column stride. A
// row's result depends on the row and its numbers only. Definition:
// kernels/fuserl_kernels/reference/sampling.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cpu/dtype.h"

namespace fuserl::cuda {

struct Sampling {
    const void* logits;
    Dtype dtype;
    std::int64_t num_rows;
    std::int64_t vocab_size;
    std::int64_t row_stride;  // in elements
    double temperature;       // 0 for the largest logit
    std::int64_t top_k;       // 0 for all
    double top_p;             // 1 for all
    double min_p;             // 0 for all
    std::uint64_t seed;
    const std::int64_t* request_ids;  // [num_rows]
    const std::int64_t* positions;    // [num_rows]
    std::int64_t* token_ids;          // [num_rows]; -1 for a row that is no distribution
    float* logprobs;                  // [num_rows]; NaN for such a row
    float* truncated_logprobs;        // [num_rows]; NaN for such a row
};

// Launches on the stream and waits for nothing. Throws std::invalid_argument for more than 2^22
// columns, which would overflow the fixed point, std::runtime_error for what CUDA refuses.
void sample_tokens(const Sampling& task, int device, cudaStream_t stream);

}  // namespace fuserl::cuda

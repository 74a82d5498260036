// RMSNorm and LayerNorm of rows on the CPU, alone or of the sum of two rows, and their gradients.
//
// Rows [num_rows, hidden_size] of unit column stride; what is written is contiguous. Arithmetic in
// float32, each result rounded once. A row's result depends on the row, the weight and the
// instruction set only; the gradients of weight and bias are added up in an order that depends on
// num_rows only. Formulas: kernels/fuserl_kernels/reference/norms.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fuserl {

struct Norm {
    const void* rows;  // what is normalised, or without the residual yet in the forward pass
    Dtype dtype;       // of all rows
    std::int64_t num_rows;
    std::int64_t hidden_size;
    // Row r begins at r / inner_rows * outer_stride + r % inner_rows * inner_stride elements.
    std::int64_t inner_rows;
    std::int64_t outer_stride;
    std::int64_t inner_stride;
    const void* weight;  // [hidden_size]
    Dtype weight_dtype;
    float weight_offset;
    bool centered;  // LayerNorm

    std::int64_t num_stats() const { return centered ? 2 : 1; }
};

struct NormForward {
    Norm norm;
    const void* bias;  // [hidden_size], or null
    Dtype bias_dtype;
    const void* residual;  // [num_rows, hidden_size], or null with summed
    double eps;
    void* y;
    void* summed;  // the rounded sum, which is what is normalised
    float* stats;  // [num_stats, num_rows]: 1 / standard deviation, and the mean
};

struct NormBackward {
    Norm norm;
    const float* stats;
    const void* grad_y;
    const void* grad_summed;  // or null
    void* grad_x;
    float* grad_vectors;  // [num_stats, hidden_size]: of weight, and of bias; or null
};

void norm_forward(const NormForward& task, int num_threads);
void norm_backward(const NormBackward& task, int num_threads);

// What instruction sets have versions of. scale = weight_offset + weight and bias are float32.
struct NormFunctions {
    void (*widen)(const void* source, Dtype dtype, float offset, std::int64_t count, float* target);
    void (*forward)(const NormForward& task, const float* scale, const float* bias,
                    std::int64_t first, std::int64_t last);
    // Adds the rows' share of grad_vectors to `sums`, by way of `run`, which is of the same size
    // and 0 before and after; both are null where none is wanted.
    void (*backward)(const NormBackward& task, const float* scale, float* run, double* sums,
                     std::int64_t first, std::int64_t last);
};

}  // namespace fuserl

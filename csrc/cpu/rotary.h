// Query, key and value heads out of one row a token, with the query and key heads turned by their
// position (and normalised before, on request): forward and backward on the CPU, in float32 with one
// rounding. Formulas: kernels/fuserl_kernels/reference/rotary.py.
//
// A token's result depends on the token and the instruction set only: the number of tokens and
// threads changes no bit, and heads written to a cache have the bits of heads that are returned.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fuserl {

constexpr std::int64_t kMaxHeadDim = 256;

struct HeadSizes {
    std::int64_t num_tokens;
    std::int64_t num_heads;
    std::int64_t num_kv_heads;
    std::int64_t head_dim;  // even, at most kMaxHeadDim

    std::int64_t heads() const { return num_heads + 2 * num_kv_heads; }
    std::int64_t row() const { return heads() * head_dim; }
};

// Cosines and sines of each position; rows of rotary_dim / 2, which may be 0.
struct RotaryTables {
    const float* cos;
    const float* sin;
    std::int64_t half;             // rotary_dim / 2
    std::int64_t cos_stride;       // of rows, in elements
    std::int64_t sin_stride;
    bool interleaved;              // pairs (2 i, 2 i + 1), else (i, i + half)
    const std::int64_t* positions;  // [num_tokens]
};

// RMS norm of the heads: x * rsqrt(mean(x^2) + eps) * (offset + weight).
struct HeadNorm {
    const void* weights[2];  // of query and of key heads [head_dim]; null for none
    Dtype dtypes[2];
    double eps;
    float offset;

    bool any() const { return weights[0] || weights[1]; }
};

// Heads with unit stride inside; strides in elements.
struct HeadTarget {
    void* data;
    std::int64_t row_stride;     // of tokens, or of slots
    std::int64_t head_stride;
    std::int64_t offset_stride;  // of the tokens of a slot
};

struct Rotary {
    HeadSizes sizes;
    Dtype dtype;
    const void* qkv;  // [num_tokens, row()]
    std::int64_t qkv_stride;
    RotaryTables tables;
    HeadNorm norm;
    HeadTarget query, key, value;
    const std::int64_t* slots;    // [num_tokens], or null: token n's key and value go to row n;
    const std::int64_t* offsets;  // below 0: nowhere
};

struct HeadGradient {
    const void* data;  // [num_tokens, heads, head_dim], or null for zero
    std::int64_t token_stride;
    std::int64_t head_stride;
};

struct RotaryBackward {
    HeadSizes sizes;
    Dtype dtype;
    HeadGradient query, key, value;
    RotaryTables tables;
    HeadNorm norm;
    const void* qkv;  // null without a norm
    std::int64_t qkv_stride;
    void* grad_qkv;        // [num_tokens, row()]
    float* grad_weights;  // [2, head_dim], or null without a norm
};

void rotary_forward(const Rotary& task, int num_threads);
void rotary_backward(const RotaryBackward& task, int num_threads);

// Gradients of the norms' weights are summed by parts of this many tokens, then over the parts.
constexpr std::int64_t kPartTokens = 16;

// What instruction sets have versions of. forward does the tokens [first, last); backward does the
// parts [first, last), with the sums of each part [2, head_dim] left in partials where there is a
// norm.
struct RotaryFunctions {
    void (*forward)(const Rotary& task, std::int64_t first, std::int64_t last);
    void (*backward)(const RotaryBackward& task, std::int64_t first, std::int64_t last,
                     float* partials);
};

}  // namespace fuserl

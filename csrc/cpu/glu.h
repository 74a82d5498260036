// activation(gate) * up for rows that hold a gate and then an up half: forward and backward on the
// CPU, in float32 with one rounding. Formulas: kernels/fuserl_kernels/reference/glu.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fuserl {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

struct Glu {
    Activation activation;
    Dtype dtype;
    const void* gate_up;  // [num_rows, 2 * size]
    std::int64_t num_rows;
    std::int64_t size;
    std::int64_t row_stride;   // in elements
    const void* grad;          // [num_rows, size], or null in the forward pass
    std::int64_t grad_stride;  // in elements
    void* out;  // [num_rows, size], or in the backward pass the gradient [num_rows, 2 * size]
};

void glu_forward(const Glu& task, int num_threads);
void glu_backward(const Glu& task, int num_threads);

// What instruction sets have versions of: each does the rows [first, last).
struct GluFunctions {
    void (*forward)(const Glu& task, std::int64_t first, std::int64_t last);
    void (*backward)(const Glu& task, std::int64_t first, std::int64_t last);
};

}  // namespace fuserl

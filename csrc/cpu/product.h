// Products of rows with a weight that was laid out for them: out = rows weight^T + bias, on the CPU.
//
// Every number of the result is one chain of multiply-adds over the inputs in ascending order, in
// float32, broken at multiples of kChain inputs, whose sums are added in ascending order. So its
// bits depend on its row, its row of the weight and the instruction set only: not on the number of
// rows, nor on threads. (A library's product takes another order for one row than for many.)
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fuserl {

constexpr std::int64_t kPanel = 16;   // outputs that lie together in a packed weight
constexpr std::int64_t kChain = 512;  // inputs; even

// A weight [num_outputs, num_inputs] in panels of kPanel outputs, the last one filled up with
// zeros. A panel is [num_inputs, kPanel]; of two-byte elements [num_inputs / 2, kPanel, 2], the
// last pair filled up with a zero.
struct PackedWeight {
    const void* panels;
    Dtype dtype;
    std::int64_t num_outputs, num_inputs;

    std::int64_t num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
    // In four-byte words, whatever the dtype: a float or a pair.
    std::int64_t panel_rows() const {
        return dtype == Dtype::kFloat32 ? num_inputs : (num_inputs + 1) / 2;
    }
    std::int64_t num_bytes() const { return num_panels() * panel_rows() * kPanel * 4; }
};

// Fill packed.panels, 64-byte aligned, from a weight of which one stride, in elements, is 1.
void pack_weight(const PackedWeight& packed, const void* weight, std::int64_t row_stride,
                 std::int64_t column_stride, int num_threads);

struct Product {
    const void* rows;  // [num_rows, num_inputs] of the weight's dtype
    std::int64_t num_rows;
    std::int64_t row_stride;    // in elements
    std::int64_t input_stride;  // likewise; 1 for two-byte elements
    PackedWeight weight;
    const void* bias;  // [num_outputs] of the weight's dtype, or null
    void* out;         // [num_rows, num_outputs], the last stride 1
    Dtype out_dtype;   // the weight's or float32
    std::int64_t out_stride;
};

void product(const Product& task, int num_threads);

// What instruction sets have versions of: rows [first, last) and panels [first, last).
struct ProductFunctions {
    void (*multiply)(const Product& task, std::int64_t first_row, std::int64_t last_row,
                     std::int64_t first_panel, std::int64_t last_panel);
    // How many panels one walk over the inputs takes.
    std::int64_t tile_panels;
};

}  // namespace fuserl

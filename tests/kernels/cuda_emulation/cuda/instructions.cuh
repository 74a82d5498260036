// Stands in for csrc/cuda/instructions.cuh: the same functions in C++, rounded like the C library.
#pragma once

#include <cuda_runtime.h>

namespace fuserl::cuda {

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? 0.0f : x; }

inline float exp2_approximate(float x) { return flushed(std::exp2(flushed(x))); }

inline float divide_approximate(float x, float y) { return x / y; }

inline float float_of_half(unsigned short bits) {
    _Float16 x;
    std::memcpy(&x, &bits, sizeof x);
    return static_cast<float>(x);
}

inline unsigned middle_of(unsigned low, unsigned high) { return low >> 16 | high << 16; }

}  // namespace fuserl::cuda

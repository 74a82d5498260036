// Instructions without a name in C++. Those for exp2 and division are what Triton's become, so a
// row's statistics get the bits of the Triton kernels. tests/kernels/cuda_emulation has stand-ins.
#pragma once

#include <cuda_runtime.h>

namespace fuserl::cuda {

__device__ inline float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float divide_approximate(float x, float y) {
    float quotient;
    asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
    return quotient;
}

__device__ inline float float_of_half(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// The lower 32 bits of (high, low) >> 16.
__device__ inline unsigned middle_of(unsigned low, unsigned high) {
    return __funnelshift_r(low, high, 16);
}

}  // namespace fuserl::cuda

// The loops, compiled once for each instruction set, and which set is in use.
#pragma once

#include <string>

#include "advantages.h"
#include "decode_attention.h"
#include "glu.h"
#include "losses.h"
#include "norms.h"
#include "product.h"
#include "rotary.h"
#include "sampling.h"
#include "token_logprobs.h"

#if defined(__x86_64__)
#define FUSERL_X86 1
#endif

namespace fuserl {

struct KernelFunctions {
    const char* name;
    RowFunctions rows;
    AdvantageFunctions advantages;
    LossFunctions losses;
    NormFunctions norms;
    SamplingFunctions sampling;
    RotaryFunctions rotary;
    GluFunctions glu;
    AttentionFunctions attention;
    ProductFunctions products;
};

extern const KernelFunctions baseline_functions;
#ifdef FUSERL_X86
extern const KernelFunctions avx2_functions;
extern const KernelFunctions avx512_functions;
// For avx512_functions on machines that have AVX512-BF16 too.
extern const ProductFunctions avx512_bf16_products;
#endif

// The best set that this machine has, until set_instruction_set chooses.
const KernelFunctions& kernel_functions();

}  // namespace fuserl

// Products of bfloat16 by the instructions made for them (AVX512-BF16): two inputs a step.
#include "target.h"

#ifdef FUSERL_X86
FUSERL_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

namespace fuserl {
namespace {
#include "simd.h"
using Simd = GenericSimd<16>;
using Floats = Simd::Floats;
#define FUSERL_DOT_BF16
#include "product_kernels.h"
}  // namespace

const ProductFunctions avx512_bf16_products{products::multiply_as<BFloat16>,
                                            products::kTilePanels};

}  // namespace fuserl

FUSERL_TARGET_END
#endif

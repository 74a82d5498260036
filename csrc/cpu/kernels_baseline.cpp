// The loops for any machine: vectors of four floats.
#include "target.h"

namespace fuserl {
namespace {
#include "simd.h"
using Simd = GenericSimd<4>;
#include "row_kernels.h"
#include "simd_math.h"
#include "kl_terms.h"
#include "advantage_kernels.h"
#include "loss_kernels.h"
#include "norm_kernels.h"
#include "sampling_kernels.h"
#include "rotary_kernels.h"
#include "glu_kernels.h"
#include "decode_attention_kernels.h"
#include "product_kernels.h"
}  // namespace

const KernelFunctions baseline_functions{"baseline", row_functions, advantage_functions, loss_functions,
                                       norm_functions, sampling_functions, rotary_functions,
                                       glu_functions, attention_functions, product_functions};

}  // namespace fuserl

// The row loops for AVX2 with FMA: vectors of eight floats.
#include "target.h"

#ifdef FUSERL_X86
FUSERL_TARGET("avx2,fma")

namespace fuserl {
namespace {
#include "simd.h"
using Simd = GenericSimd<8>;
#include "row_kernels.h"
}  // namespace

const RowFunctions avx2_rows{"avx2", forward, backward};

}  // namespace fuserl

FUSERL_TARGET_END
#endif

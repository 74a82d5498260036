// The row loops for any machine: vectors of four floats.
#include "target.h"

namespace fuserl {
namespace {
#include "simd.h"
using Simd = GenericSimd<4>;
#include "row_kernels.h"
}  // namespace

const RowFunctions baseline_rows{"baseline", forward, backward};

}  // namespace fuserl

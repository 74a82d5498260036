// From scores to advantages on the CPU.
#pragma once

namespace fuserl {

// What instruction sets have versions of.
struct AdvantageFunctions {};

}  // namespace fuserl

// The losses on the CPU.
#pragma once

namespace fuserl {

// What instruction sets have versions of.
struct LossFunctions {};

}  // namespace fuserl

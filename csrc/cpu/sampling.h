// One sampled token a row on the CPU.
#pragma once

namespace fuserl {

// What instruction sets have versions of.
struct SamplingFunctions {};

}  // namespace fuserl

// One sampled token a row on the CPU: the loops over a struct Simd, as in row_kernels.h.

constexpr SamplingFunctions sampling_functions{};

// From scores to advantages on the CPU: the loops over a struct Simd, as in row_kernels.h.

constexpr AdvantageFunctions advantage_functions{};

// The losses on the CPU: the loops over a struct Simd, as in row_kernels.h.

constexpr LossFunctions loss_functions{};

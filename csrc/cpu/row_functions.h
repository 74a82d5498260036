// The row loops, compiled once for each instruction set (row_kernels.h), and their types.
#pragma once

#include "token_logprobs.h"

#if defined(__x86_64__)
#define FUSERL_X86 1
#endif

namespace fuserl {

// Each does the rows [first, last).
struct RowFunctions {
    const char* name;
    void (*forward)(const Forward& task, std::int64_t first, std::int64_t last);
    void (*backward)(const Backward& task, std::int64_t first, std::int64_t last);
};

extern const RowFunctions baseline_rows;
#ifdef FUSERL_X86
extern const RowFunctions avx2_rows;
extern const RowFunctions avx512_rows;
#endif

}  // namespace fuserl

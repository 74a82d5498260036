#include "instruction_set.h"

#include <stdexcept>

#include "kernel_functions.h"

namespace fuserl {
namespace {

// The best first; each machine has the last.
const KernelFunctions* const kSets[] = {
#ifdef FUSERL_X86
    &avx512_functions,
    &avx2_functions,
#endif
    &baseline_functions,
};

bool runs_here(const KernelFunctions* set) {
#ifdef FUSERL_X86
    __builtin_cpu_init();
    if (set == &avx512_functions)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (set == &avx2_functions) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return set == &baseline_functions;
}

const KernelFunctions* best() {
    for (const KernelFunctions* set : kSets)
        if (runs_here(set)) return set;
    return &baseline_functions;
}

const KernelFunctions*& chosen() {
    static const KernelFunctions* set = best();
    return set;
}

}  // namespace

const KernelFunctions& kernel_functions() { return *chosen(); }

const char* instruction_set() { return chosen()->name; }

void set_instruction_set(const std::string& name) {
    for (const KernelFunctions* set : kSets)
        if (name == set->name && runs_here(set)) {
            chosen() = set;
            return;
        }
    throw std::invalid_argument("this machine has no instruction set named " + name);
}

}  // namespace fuserl

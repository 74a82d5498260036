// Begins the part of a file that is compiled for one instruction set. Every other header comes
// before it: what they define may be merged with copies from other files, and must run anywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernel_functions.h"

#ifdef FUSERL_X86
#include <immintrin.h>
#endif

#define FUSERL_INLINE inline __attribute__((always_inline))
#define FUSERL_LAMBDA __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__clang__)
#define FUSERL_PRAGMA(text) _Pragma(#text)
#define FUSERL_TARGET(flags) \
    FUSERL_PRAGMA(clang attribute push(__attribute__((target(flags))), apply_to = function))
#define FUSERL_TARGET_END _Pragma("clang attribute pop")
#else
#define FUSERL_PRAGMA(text) _Pragma(#text)
#define FUSERL_TARGET(flags) FUSERL_PRAGMA(GCC push_options) FUSERL_PRAGMA(GCC target(flags))
#define FUSERL_TARGET_END _Pragma("GCC pop_options")
#endif

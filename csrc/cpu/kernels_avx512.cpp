// The loops for AVX-512: vectors of sixteen floats, an exponential of eleven instructions, and
// bfloat16 taken apart and put together two columns at a time.
#include "target.h"

#ifdef FUSERL_X86
FUSERL_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")

namespace fuserl {
namespace {
#include "simd.h"

// 2^(i / 32)
alignas(64) constexpr float kPowers[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f,
    0x1.2387a6p+0f, 0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f,
    0x1.4bfdaep+0f, 0x1.5342b6p+0f, 0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f,
    0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f,
    0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
    0x1.ea4afap+0f, 0x1.f50766p+0f,
};

struct Simd : GenericSimd<16> {
    using GenericSimd<16>::load;
    using GenericSimd<16>::store;
    using GenericSimd<16>::load_pair;
    using GenericSimd<16>::store_pair;

    static FUSERL_INLINE Floats at_least(Floats x, Floats bound) { return _mm512_max_ps(bound, x); }

    static FUSERL_INLINE Floats grown(Floats maximum, Floats x) {
        return _mm512_max_ps(x, maximum);
    }

    static FUSERL_INLINE Floats load(const Float16* source) {
        __m256i halves;
        std::memcpy(&halves, source, sizeof halves);
        return _mm512_cvtph_ps(halves);
    }

    static FUSERL_INLINE void store(Float16* target, Floats x) {
        const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        std::memcpy(target, &halves, sizeof halves);
    }

    template <typename T>
    static FUSERL_INLINE void load_pair(const T* source, Floats (&x)[2]) {
        x[0] = load(source);
        x[1] = load(source + kWidth);
    }

    // Even columns, then odd ones: one instruction each.
    static FUSERL_INLINE void load_pair(const BFloat16* source, Floats (&x)[2]) {
        Words both;
        std::memcpy(&both, source, sizeof both);
        x[0] = floats(both << 16);
        x[1] = floats(both & 0xffff0000u);
    }

    template <typename T>
    static FUSERL_INLINE void store_pair(T* target, const Floats (&x)[2]) {
        store(target, x[0]);
        store(target + kWidth, x[1]);
    }

    static FUSERL_INLINE void store_pair(BFloat16* target, const Floats (&x)[2]) {
        const Words both = (rounded(x[0]) >> 16) | (rounded(x[1]) & 0xffff0000u);
        std::memcpy(target, &both, sizeof both);
    }

    template <int kHalf>
    static FUSERL_INLINE Doubles doubles(Floats x) {
        return _mm512_cvtps_pd(kHalf == 0 ? _mm512_castps512_ps256(x)
                                          : _mm512_extractf32x8_ps(x, 1));
    }

    static FUSERL_INLINE double lane_sum(Floats x) {
        return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)),
                                                  _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
    }

    static FUSERL_INLINE float lane_maximum(Floats x) { return _mm512_reduce_max_ps(x); }

    // log2(e) / temperature in two floats, and the difference whose weight is 2^-160.
    struct Scale {
        float high, low, floor;

        FUSERL_INLINE explicit Scale(double temperature) {
            const double factor = 1.4426950408889634 / temperature;
            high = static_cast<float>(factor);
            low = static_cast<float>(factor - high);
            const double lowest = -160.0 / factor;
            floor = lowest < -kLargest ? -kLargest : static_cast<float>(lowest);
        }
    };

    // 2^t with t = n + r, n a multiple of 1/32 and |r| <= 1/64: 2^n from a table and the exponent,
    // 2^r as a minimax parabola through 1 (relative error 5.3e-8 before rounding).
    static FUSERL_INLINE Floats weight(Floats difference, const Scale& scale) {
        const Floats shifter = splat(393216.0f);  // 1.5 * 2^18: adding it rounds to 1/32
        const Floats shifted = _mm512_fmadd_ps(difference, splat(scale.high), shifter);
        const Floats n = shifted - shifter;
        Floats r = _mm512_fmsub_ps(difference, splat(scale.high), n);
        r = _mm512_fmadd_ps(difference, splat(scale.low), r);
        const Floats power =
            _mm512_permutex2var_ps(_mm512_load_ps(kPowers), _mm512_castps_si512(shifted),
                                   _mm512_load_ps(kPowers + 16));
        const Floats slope = _mm512_fmadd_ps(r, splat(0x1.ebfbe4p-3f), splat(0x1.62e584p-1f));
        return _mm512_scalef_ps(_mm512_fmadd_ps(power * r, slope, power), n);
    }

   private:
    // In the upper half the nearest bfloat16, ties to even.
    static FUSERL_INLINE Words rounded(Floats x) {
        const Words bits = words(x);
        const Words sum = bits + 0x7fffu + ((bits >> 16) & 1u);
        return x == x ? sum : bits | 0x400000u;
    }
};

#include "row_kernels.h"
#include "simd_math.h"
#include "kl_terms.h"
#include "advantage_kernels.h"
#include "loss_kernels.h"
#include "norm_kernels.h"
#include "sampling_kernels.h"
#include "rotary_kernels.h"
#include "glu_kernels.h"
#include "decode_attention_kernels.h"
#include "product_kernels.h"
}  // namespace

const KernelFunctions avx512_functions{"avx512", row_functions, advantage_functions, loss_functions,
                                       norm_functions, sampling_functions, rotary_functions,
                                       glu_functions, attention_functions, product_functions};

}  // namespace fuserl

FUSERL_TARGET_END
#endif

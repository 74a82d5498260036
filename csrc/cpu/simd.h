// Vectors of kLanes floats in the compilers' own extension: one source for every instruction set.
//
// Everything here is inlined, so that it takes on the instruction set of the file that includes it
// and no calling convention matters. Included inside an anonymous namespace, after the headers.

// The elements of logits and gradients: float, and two halves that differ in their bits only.
struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();

template <typename T, int kLanes>
struct Vector {
    typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

template <int kLanes>
struct GenericSimd {
    static constexpr std::int64_t kWidth = kLanes;

    using Floats = typename Vector<float, kLanes>::type;
    using Words = typename Vector<std::uint32_t, kLanes>::type;
    using Halves = typename Vector<std::uint16_t, kLanes>::type;
    using Doubles = typename Vector<double, kLanes / 2>::type;

    static FUSERL_INLINE Floats splat(float x) { return Floats{} + x; }

    static FUSERL_INLINE Words words(Floats x) {
        Words bits;
        std::memcpy(&bits, &x, sizeof bits);
        return bits;
    }

    static FUSERL_INLINE Floats floats(Words bits) {
        Floats x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }

    // x * y + z, rounded once where the instruction set can.
    static FUSERL_INLINE Floats multiply_add(Floats x, Floats y, Floats z) {
#if defined(FUSERL_X86)
        if constexpr (kLanes == 8) return _mm256_fmadd_ps(x, y, z);
        if constexpr (kLanes == 16) return _mm512_fmadd_ps(x, y, z);
#endif
        return x * y + z;
    }

    // x as it is rounded: the compiler makes no part of a multiply-add of what gave it.
    static FUSERL_INLINE Floats rounded_value(Floats x) {
#if defined(__x86_64__)
        asm("" : "+v"(x));
#elif defined(__aarch64__)
        asm("" : "+w"(x));
#endif
        return x;
    }

    // The larger of the two, and x where x is NaN.
    static FUSERL_INLINE Floats at_least(Floats x, Floats bound) {
        return x < bound ? bound : x;
    }

    // The larger of the two, and `maximum` where x is NaN.
    static FUSERL_INLINE Floats grown(Floats maximum, Floats x) {
        return x > maximum ? x : maximum;
    }

    static FUSERL_INLINE Floats widen(Halves halves, BFloat16) {
        return floats(__builtin_convertvector(halves, Words) << 16);
    }

    // A float16's exponent and digits as a float32's are 2^112 too small, subnormals too.
    static FUSERL_INLINE Floats widen(Halves halves, Float16) {
        const Words bits = __builtin_convertvector(halves, Words);
        const Words magnitude = bits & 0x7fffu;
        const Words finite = words(floats(magnitude << 13) * 0x1p112f);
        const Words special = (magnitude << 13) | 0x7f800000u;  // infinity or NaN
        const Words x = magnitude >= 0x7c00u ? special : finite;
        return floats(x | ((bits & 0x8000u) << 16));
    }

    // Both round to nearest, ties to even; a NaN stays one.
    static FUSERL_INLINE Halves narrow(Floats x, BFloat16) {
        const Words bits = words(x);
        const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Words quiet = (bits >> 16) | 0x40u;
        return __builtin_convertvector(Words(x == x ? rounded : quiet), Halves);
    }

    static FUSERL_INLINE Halves narrow(Floats x, Float16) {
        const Words bits = words(x);
        const Words sign = (bits >> 16) & 0x8000u;
        const Words magnitude = bits & 0x7fffffffu;
        // Normal results: drop 13 digits and 112 from the exponent. 65520 and above round to
        // infinity, whose pattern is the one after the largest finite number's.
        const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
        // Subnormal results: adding 1/2 leaves multiples of 2^-24 as the last digits.
        const Words small = words(floats(magnitude) + 0.5f) - 0x3f000000u;
        Words half = magnitude < 0x38800000u ? small : normal;
        half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;
        half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
        return __builtin_convertvector(half | sign, Halves);
    }

    static FUSERL_INLINE Floats load(const float* source) {
        Floats x;
        std::memcpy(&x, source, sizeof x);
        return x;
    }

    template <typename T>
    static FUSERL_INLINE Floats load(const T* source) {
        Halves halves;
        std::memcpy(&halves, source, sizeof halves);
        return widen(halves, T{});
    }

    static FUSERL_INLINE void store(float* target, Floats x) { std::memcpy(target, &x, sizeof x); }

    template <typename T>
    static FUSERL_INLINE void store(T* target, Floats x) {
        const Halves halves = narrow(x, T{});
        std::memcpy(target, &halves, sizeof halves);
    }

    // The first `count` columns; lanes past them hold -inf, which adds nothing to any sum.
    template <typename T>
    static FUSERL_INLINE Floats load_some(const T* source, std::int64_t count) {
        if (count >= kLanes) return load(source);
        T lanes[kLanes];
        store(lanes, splat(-kInfinity));
        std::memcpy(lanes, source, sizeof(T) * count);
        return load(lanes);
    }

    template <typename T>
    static FUSERL_INLINE void store_some(T* target, Floats x, std::int64_t count) {
        if (count >= kLanes) return store(target, x);
        T lanes[kLanes];
        store(lanes, x);
        std::memcpy(target, lanes, sizeof(T) * count);
    }

    // Two vectors from 2 * kLanes columns, in whatever order suits the dtype; store_pair undoes it.
    template <typename T>
    static FUSERL_INLINE void load_pair(const T* source, Floats (&x)[2]) {
        x[0] = load(source);
        x[1] = load(source + kLanes);
    }

    template <typename T>
    static FUSERL_INLINE void store_pair(T* target, const Floats (&x)[2]) {
        store(target, x[0]);
        store(target + kLanes, x[1]);
    }

    // The first or the second half of the lanes.
    template <int kHalf>
    static FUSERL_INLINE Doubles doubles(Floats x) {
        typename Vector<float, kLanes / 2>::type halves[2];
        std::memcpy(halves, &x, sizeof x);
        return __builtin_convertvector(halves[kHalf], Doubles);
    }

    static FUSERL_INLINE double lane_total(Doubles x) {
        double total = 0.0;
        for (int lane = 0; lane < kLanes / 2; ++lane) total += x[lane];
        return total;
    }

    static FUSERL_INLINE double lane_sum(Floats x) {
        double sum = 0.0;
        for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
        return sum;
    }

    static FUSERL_INLINE float lane_maximum(Floats x) {
        float maximum = -kInfinity;
        for (int lane = 0; lane < kLanes; ++lane) maximum = x[lane] > maximum ? x[lane] : maximum;
        return maximum;
    }

    // What turns a difference of logits into a weight e^(difference / temperature).
    struct Scale {
        float inverse;
        float floor;  // any difference below counts as this one, whose weight is 0

        FUSERL_INLINE explicit Scale(double temperature)
            : inverse(static_cast<float>(1.0 / temperature)),
              floor(static_cast<float>(-110.0 * temperature)) {}
    };

    // e^s with s = difference / temperature <= 80: s = n ln 2 + r with |r| <= ln 2 / 2 and a
    // minimax polynomial (relative error 3e-9 before rounding). Below -87.3, where the result would
    // be subnormal, 0; NaN stays NaN.
    static FUSERL_INLINE Floats weight(Floats difference, const Scale& scale) {
        const Floats s = difference * scale.inverse;
        const Floats shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
        const Floats shifted = s * 1.44269504f + shifter;
        const Floats n = shifted - shifter;
        Floats r = s - n * 0.693359375f;
        r = r + n * 2.12194440e-4f;
        Floats p = splat(0.0013814599f);
        p = p * r + 0.008368717f;
        p = p * r + 0.04166839f;
        p = p * r + 0.16666521f;
        p = p * r + 0.49999994f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        Floats result = floats(words(p) + (words(shifted) << 23));
        result = s < -87.3f ? Floats{} : result;
        return s == s ? result : s;
    }
};

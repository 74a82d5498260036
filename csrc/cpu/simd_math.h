// Functions of vectors of floats, over a struct Simd, and masks of bool bytes.

using Words = Simd::Words;

// e^x for any x, 0 to infinity; relative error about 2e-7. Squaring keeps the argument of
// Simd::weight small.
FUSERL_INLINE Floats exponential(Floats x) {
    const Simd::Scale unit(1.0);
    const Floats half = Simd::at_least(x * 0.5f, Simd::splat(-100.0f));
    const Floats bounded = half > 60.0f ? Simd::splat(60.0f) : half;
    const Floats root = Simd::weight(bounded, unit);
    return root * root;
}

// e^x - 1, without cancellation near 0: there a Taylor series, whose remainder is below 2e-8.
FUSERL_INLINE Floats exponential_minus_one(Floats x) {
    Floats series = 1.0f + x * (1.0f / 8.0f);
    series = 1.0f + x * (1.0f / 7.0f) * series;
    series = 1.0f + x * (1.0f / 6.0f) * series;
    series = 1.0f + x * (1.0f / 5.0f) * series;
    series = 1.0f + x * (1.0f / 4.0f) * series;
    series = 1.0f + x * (1.0f / 3.0f) * series;
    series = 1.0f + x * (1.0f / 2.0f) * series;
    const Floats magnitude = x < 0.0f ? -x : x;
    return magnitude < 0.4f ? x * series : exponential(x) - 1.0f;
}

// All bits set in the lanes whose byte is true; lanes past `count` are false.
FUSERL_INLINE Words load_mask(const bool* source, std::int64_t count) {
    using Bytes = typename Vector<std::uint8_t, Simd::kWidth>::type;
    Bytes bytes{};
    std::memcpy(&bytes, source, count >= Simd::kWidth ? Simd::kWidth : count);
    return Words{} - __builtin_convertvector(bytes, Words);
}

// x where the mask is set, 0 elsewhere, whatever x holds there.
FUSERL_INLINE Floats masked(Floats x, Words mask) { return Simd::floats(Simd::words(x) & mask); }

// Vectors of KL estimates of d = logprob - ref_logprob, over a struct Simd. Comparisons with NaN are
// false, and what they leave is the NaN.

// e^-d - 1 + d; near 0 as a series (the next term is below 2e-8 of the sum), free of cancellation.
FUSERL_INLINE Floats third_estimate(Floats d) {
    const Floats y = -d;
    Floats series = 1.0f + y * (1.0f / 9.0f);
    series = 1.0f + y * (1.0f / 8.0f) * series;
    series = 1.0f + y * (1.0f / 7.0f) * series;
    series = 1.0f + y * (1.0f / 6.0f) * series;
    series = 1.0f + y * (1.0f / 5.0f) * series;
    series = 1.0f + y * (1.0f / 4.0f) * series;
    series = 1.0f + y * (1.0f / 3.0f) * series;
    const Floats magnitude = d < 0.0f ? y : d;
    return magnitude < 0.5f ? y * y * 0.5f * series : exponential(y) - 1.0f + d;
}

FUSERL_INLINE Floats unclipped_estimate(Floats d, KlEstimator estimator) {
    switch (estimator) {
        case KlEstimator::kK1: return d;
        case KlEstimator::kK2: return d * d * 0.5f;
        case KlEstimator::kK3: return third_estimate(d);
        case KlEstimator::kAbs: return d < 0.0f ? -d : d;
    }
    return d;
}

FUSERL_INLINE Floats kl_estimate(Floats d, const KlOptions& options) {
    Floats kl = unclipped_estimate(d, options.estimator);
    if (options.clip != 0.0f) {
        kl = kl > options.clip ? Simd::splat(options.clip) : kl;
        kl = kl < -options.clip ? Simd::splat(-options.clip) : kl;
    }
    return kl;
}

// The estimate's derivative.
FUSERL_INLINE Floats kl_slope(Floats d, const KlOptions& options) {
    Floats slope = Simd::splat(1.0f);
    switch (options.estimator) {
        case KlEstimator::kK1: break;
        case KlEstimator::kK2: slope = d; break;
        case KlEstimator::kK3: slope = -exponential_minus_one(-d); break;
        case KlEstimator::kAbs:
            slope = d > 0.0f ? slope : d < 0.0f ? -slope : Floats{};
            break;
    }
    if (options.clip != 0.0f) {
        const Floats kl = unclipped_estimate(d, options.estimator);
        slope = kl > options.clip ? Floats{} : kl < -options.clip ? Floats{} : slope;
    }
    return slope;
}

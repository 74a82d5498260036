// What the policy loss makes of vectors of tokens: the surrogate's terms and the correction.
// Selections keep NaN: a comparison with one is false, so the selected value is the one that may
// hold it. Included by loss_kernels.h.

constexpr float kMaxLogRatio = 40.0f;  // MAX_LOG_RATIO of reference/policy.py

FUSERL_INLINE Floats clamped(Floats x, float low, float high) {
    x = x < low ? Simd::splat(low) : x;
    return x > high ? Simd::splat(high) : x;
}

// e^x for x <= 80.
FUSERL_INLINE Floats ratio_of(Floats log_ratio) {
    const Simd::Scale unit(1.0);
    return Simd::weight(Simd::at_least(log_ratio, Simd::splat(-100.0f)), unit);
}

FUSERL_INLINE Floats logistic(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

FUSERL_INLINE Floats zero_where(Words condition, Floats x) {
    return Simd::floats(Simd::words(x) & ~condition);
}

struct Term {
    Floats term, slope;
    Words clipped;
};

// Each surrogate is called with (new_logprobs, log-ratio within its bounds, ratio, advantages).
// kThroughRatio: the slope is that to the log-ratio, not to the logprob.

struct PpoClip {
    static constexpr bool kThroughRatio = true;
    float low, high, dual_clip;

    FUSERL_INLINE explicit PpoClip(const PolicyLoss& task)
        : low(static_cast<float>(1.0 - task.clip_low)),
          high(static_cast<float>(1.0 + task.clip_high)),
          dual_clip(static_cast<float>(task.dual_clip)) {}

    FUSERL_INLINE Term operator()(Floats, Floats, Floats ratio, Floats advantages) const {
        const Floats unclipped = ratio * advantages;
        const Floats bounded = clamped(ratio, low, high) * advantages;
        Words clipped = Words(bounded < unclipped);
        Floats objective = bounded < unclipped ? bounded : unclipped;
        if (dual_clip != 0.0f) {
            const Floats floor = advantages < 0.0f ? dual_clip * advantages : -kInfinity + Floats{};
            clipped |= Words(objective < floor);
            objective = objective < floor ? floor : objective;
        }
        return {-objective, zero_where(clipped, -unclipped), clipped};
    }
};

struct CispoClip {
    static constexpr bool kThroughRatio = false;
    float low, high;

    FUSERL_INLINE explicit CispoClip(const PolicyLoss& task)
        : low(static_cast<float>(1.0 - task.clip_low)),
          high(static_cast<float>(1.0 + task.clip_high)) {}

    FUSERL_INLINE Term operator()(Floats logprobs, Floats, Floats ratio, Floats advantages) const {
        const Floats bounded = clamped(ratio, low, high);
        const Floats weight = bounded * advantages;
        return {zero_where(Words(weight == 0.0f), -weight * logprobs), -weight,
                Words(bounded != ratio)};
    }
};

struct SapoGate {
    static constexpr bool kThroughRatio = true;
    float positive, negative;

    FUSERL_INLINE explicit SapoGate(const PolicyLoss& task)
        : positive(static_cast<float>(task.gate_pos)),
          negative(static_cast<float>(task.gate_neg)) {}

    FUSERL_INLINE Term operator()(Floats, Floats, Floats ratio, Floats advantages) const {
        const Floats zero{};
        const Floats tau = advantages > 0.0f ? positive + zero : negative + zero;
        const Floats excess = tau * (ratio - 1.0f);
        const Floats gate = logistic(excess);
        return {-4.0f / tau * gate * advantages,
                -4.0f * gate * logistic(-excess) * (ratio * advantages), Words{}};
    }
};

struct VespoGate {
    static constexpr bool kThroughRatio = false;
    float k_pos, k_neg, rate_pos, rate_neg;

    FUSERL_INLINE explicit VespoGate(const PolicyLoss& task)
        : k_pos(static_cast<float>(task.gate_pos)),
          k_neg(static_cast<float>(task.gate_neg)),
          rate_pos(static_cast<float>(task.gate_rate_pos)),
          rate_neg(static_cast<float>(task.gate_rate_neg)) {}

    FUSERL_INLINE Term operator()(Floats logprobs, Floats log_ratio, Floats ratio,
                                  Floats advantages) const {
        const Floats zero{};
        const Floats k = advantages >= 0.0f ? k_pos + zero : k_neg + zero;
        const Floats rate = advantages >= 0.0f ? rate_pos + zero : rate_neg + zero;
        // 0 * -inf: a ratio of 0 with k = 0 has its own limit
        const Floats power = zero_where(Words(k == 0.0f), k * log_ratio);
        const Floats weight = exponential(rate + power - rate * ratio) * advantages;
        return {zero_where(Words(weight == 0.0f), -weight * logprobs), -weight, Words{}};
    }
};

struct NoClip {
    static constexpr bool kThroughRatio = true;

    FUSERL_INLINE explicit NoClip(const PolicyLoss&) {}

    FUSERL_INLINE Term operator()(Floats, Floats, Floats ratio, Floats advantages) const {
        const Floats unclipped = ratio * advantages;
        return {-unclipped, -unclipped, Words{}};
    }
};

struct Corrections {
    Floats factor;
    Words outside;
};

// Of log_ratio = logprob - rollout_logprob.
FUSERL_INLINE Corrections corrections(Floats log_ratio, const PolicyLoss& task) {
    const float low = static_cast<float>(task.correction_low);
    const float high = static_cast<float>(task.correction_high);
    const Floats bounded = log_ratio > kMaxLogRatio ? Simd::splat(kMaxLogRatio) : log_ratio;
    const Floats ratio = ratio_of(bounded);
    const Words outside = Words(ratio < low) | Words(ratio > high);
    if (task.correction == Correction::kTruncate) return {clamped(ratio, low, high), outside};
    if (task.correction == Correction::kMask) return {zero_where(outside, ratio), outside};
    return {zero_where(outside, Simd::splat(1.0f)), outside};
}

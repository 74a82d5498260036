// From scores to advantages on the CPU: the loops over a struct Simd, as in row_kernels.h. Vectors
// begin where the row does, so what a longer row pads changes no bit of the slots before it.

namespace advantages {

using Bytes = Vector<std::uint8_t, Simd::kWidth>::type;

template <int... kLane>
struct LaneList {};

// 0, 1, .. kCount - 1
template <int kCount, int... kLane>
struct LanesUpTo : LanesUpTo<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct LanesUpTo<0, kLane...> {
    using type = LaneList<kLane...>;
};
using AllLanes = LanesUpTo<static_cast<int>(Simd::kWidth)>::type;

template <int... kLane>
FUSERL_INLINE Bytes one_at(std::uint8_t lane, LaneList<kLane...>) {
    return Bytes{static_cast<std::uint8_t>(kLane == lane)...};
}

// The `count` slots from `start` on; lanes past them are 0.
FUSERL_INLINE Bytes load_bytes(const bool* slots, std::int64_t start, std::int64_t count) {
    if (count >= Simd::kWidth) {
        Bytes whole;
        std::memcpy(&whole, slots + start, sizeof whole);
        return whole;
    }
    Bytes some{};
    std::memcpy(&some, slots + start, static_cast<std::size_t>(count));
    return some;
}

FUSERL_INLINE Bytes load_bytes(const RowMask& mask, std::int64_t start, std::int64_t count) {
    const Bytes bytes = load_bytes(mask.slots, start, count);
    const auto extra = static_cast<std::uint64_t>(mask.extra - start);
    if (extra >= static_cast<std::uint64_t>(Simd::kWidth)) return bytes;
    return bytes | one_at(static_cast<std::uint8_t>(extra), AllLanes{});
}

// Whether every byte is `value`.
FUSERL_INLINE bool all_are(Bytes bytes, std::uint8_t value) {
    using Part = std::conditional_t<Simd::kWidth % 8 == 0, std::uint64_t, std::uint32_t>;
    Part parts[sizeof bytes / sizeof(Part)], differences = 0;
    std::memcpy(parts, &bytes, sizeof parts);
    for (Part part : parts) differences |= part ^ (std::numeric_limits<Part>::max() / 255 * value);
    return differences == 0;
}

FUSERL_INLINE Words lanes_of(Bytes bytes) { return Words{} - __builtin_convertvector(bytes, Words); }

FUSERL_INLINE Floats load_masked(const float* source, std::int64_t count, Words mask) {
    return masked(Simd::load_some(source, count), mask);
}

// --- KL penalty

void kl_forward(const KlPenalty& task, std::int64_t first, std::int64_t last) {
    [[maybe_unused]] const FlushSubnormals flush;
    for (std::int64_t i = first; i < last; i += Simd::kWidth) {
        const std::int64_t count = last - i;
        const Floats d = Simd::load_some(task.logprobs + i, count) -
                         Simd::load_some(task.ref_logprobs + i, count);
        Simd::store_some(task.out + i, kl_estimate(d, task.kl), count);
    }
}

void kl_backward(const KlPenalty& task, std::int64_t first, std::int64_t last) {
    [[maybe_unused]] const FlushSubnormals flush;
    for (std::int64_t i = first; i < last; i += Simd::kWidth) {
        const std::int64_t count = last - i;
        const Floats d = Simd::load_some(task.logprobs + i, count) -
                         Simd::load_some(task.ref_logprobs + i, count);
        const Floats g = Simd::load_some(task.grad + i, count) * kl_slope(d, task.kl);
        Simd::store_some(task.out + i, g, count);
        Simd::store_some(task.grad_ref_logprobs + i, -g, count);
    }
}

// --- rewards

void shape(const Shaping& task, const ShapingRow& row) {
    [[maybe_unused]] const FlushSubnormals flush;
    for (std::int64_t start = 0; start < task.num_slots; start += Simd::kWidth) {
        const std::int64_t count = task.num_slots - start;
        const Bytes bytes = load_bytes(row.loss_mask, start, count);
        Floats kl{}, rewards{};
        if (!all_are(bytes, 0)) {
            const Words mask = lanes_of(bytes);
            const Floats d = load_masked(row.logprobs + start, count, mask) -
                             load_masked(row.ref_logprobs + start, count, mask);
            kl = kl_estimate(d, task.kl);
            Floats score{};
            if (row.scores != nullptr) {
                score = load_masked(row.scores + start, count, mask);
                score = score > task.score_clip ? Simd::splat(task.score_clip) : score;
                score = score < -task.score_clip ? Simd::splat(-task.score_clip) : score;
                score = score * task.score_scale;
            }
            rewards = score - task.kl_coef * kl;
        }
        Simd::store_some(row.kl + start, kl, count);
        Simd::store_some(row.rewards + start, rewards, count);
    }
    if (row.slot >= 0) row.rewards[row.slot] += row.score;
}

// --- the recursion of struct Discount

// Lane i gets what lane i + kShift held; the last kShift lanes get those of `behind`.
template <int kShift, int... kLane>
FUSERL_INLINE Floats shifted(Floats x, Floats behind, LaneList<kLane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(x, behind, (kLane + kShift)...);
#else
    return __builtin_shuffle(x, behind, Words{(kLane + kShift)...});
#endif
}

template <int kShift>
FUSERL_INLINE Floats shifted(Floats x, Floats behind) {
    return shifted<kShift>(x, behind, AllLanes{});
}

class BackwardScan {
   public:
    FUSERL_INLINE explicit BackwardScan(const Discount& discount)
        : powers_(discount.powers), carry_(discount.carry) {
        static_assert(Simd::kWidth <= Discount::kMostLanes);
        for (int lane = 0; lane < Simd::kWidth; ++lane)
            decay_of_behind_[lane] = powers_[Simd::kWidth - lane];
    }

    // Past a vector without a slot.
    FUSERL_INLINE void skip() {
        if (carry_) behind_ *= powers_[Simd::kWidth];
    }

    // X_{t+1} of each lane, from what each adds to X: 0 at a hole. Takes vectors from the last on.
    FUSERL_INLINE Floats following(Floats added, Bytes slots) {
        Floats x = added;
        if (carry_ || all_are(slots, 1)) {
            evenly<1>(x);
            x = x + decay_of_behind_ * behind_;
        } else {
            Floats decay = lanes_of(slots) ? Simd::splat(powers_[1]) : Simd::splat(1.0f);
            through_holes<1>(x, decay);
            x = x + decay * behind_;
        }
        const Floats result = shifted<1>(x, Simd::splat(behind_));
        behind_ = x[0];
        return result;
    }

   private:
    // After the step of kShift, x_i is the sum over the 2 kShift lanes from i on, decayed.
    template <int kShift>
    FUSERL_INLINE void evenly(Floats& x) const {
        if constexpr (kShift < Simd::kWidth) {
            x = x + powers_[kShift] * shifted<kShift>(x, Floats{});
            evenly<2 * kShift>(x);
        }
    }

    // Likewise, where `decay` becomes the product over the same lanes.
    template <int kShift>
    FUSERL_INLINE void through_holes(Floats& x, Floats& decay) const {
        if constexpr (kShift < Simd::kWidth) {
            x = x + decay * shifted<kShift>(x, Floats{});
            decay = decay * shifted<kShift>(decay, Simd::splat(1.0f));
            through_holes<2 * kShift>(x, decay);
        }
    }

    const float* powers_;
    bool carry_;
    Floats decay_of_behind_;
    float behind_ = 0.0f;  // X of the first lane of the vector before
};

void gae(const Discount& discount, const GaeRow& row) {
    [[maybe_unused]] const FlushSubnormals flush;
    BackwardScan scan(discount);
    const std::int64_t num_vectors = (row.size + Simd::kWidth - 1) / Simd::kWidth;
    for (std::int64_t start = (num_vectors - 1) * Simd::kWidth; start >= 0; start -= Simd::kWidth) {
        const std::int64_t count = row.size - start;
        const Bytes loss_bytes = load_bytes(row.loss_mask, start, count);
        const Bytes value_bytes = load_bytes(row.value_mask, start, count);
        const Bytes slots = loss_bytes | value_bytes;
        Floats returns{}, advantages{};
        if (all_are(slots, 0)) {
            scan.skip();
        } else {
            const Words value_mask = lanes_of(value_bytes);
            const Floats r = load_masked(row.rewards + start, count, value_mask);
            Floats v{};
            if (row.values != nullptr) v = load_masked(row.values + start, count, value_mask);
            const Floats added = discount.powers[1] * r + discount.value_weight * v;
            const Floats sum = r + scan.following(added, slots);
            returns = masked(sum, value_mask);
            advantages = masked(sum - v, lanes_of(loss_bytes));
        }
        Simd::store_some(row.advantages + start, advantages, count);
        if (row.returns != nullptr) Simd::store_some(row.returns + start, returns, count);
    }
}

// --- whitening

using Doubles = Simd::Doubles;

// Call visit(x, mask) with the vectors that have a slot of the mask, x being 0 elsewhere.
template <typename Visit>
FUSERL_INLINE void each_masked(const float* x, const RowMask& mask, std::int64_t size,
                               const Visit& visit) {
    for (std::int64_t start = 0; start < size; start += Simd::kWidth) {
        const Bytes bytes = load_bytes(mask, start, size - start);
        if (all_are(bytes, 0)) continue;
        const Words lanes = lanes_of(bytes);
        visit(load_masked(x + start, size - start, lanes), lanes);
    }
}

// Two passes: the second finds the row in the cache.
Moments moments(const float* x, RowMask mask, std::int64_t size) {
    Words minus_counts{};
    Doubles low{}, high{};
    each_masked(x, mask, size, [&](Floats kept, Words lanes) FUSERL_LAMBDA {
        minus_counts += lanes;
        low += Simd::doubles<0>(kept);
        high += Simd::doubles<1>(kept);
    });
    const Words counts = Words{} - minus_counts;
    double count = 0.0;
    for (int lane = 0; lane < Simd::kWidth; ++lane) count += counts[lane];
    if (count == 0.0) return {0.0, 0.0, 0.0};
    const double mean = Simd::lane_total(low + high) / count;
    low = high = Doubles{};
    each_masked(x, mask, size, [&](Floats kept, Words lanes) FUSERL_LAMBDA {
        const Floats inside = masked(Simd::splat(1.0f), lanes);
        const Doubles d = (Simd::doubles<0>(kept) - mean) * Simd::doubles<0>(inside);
        const Doubles e = (Simd::doubles<1>(kept) - mean) * Simd::doubles<1>(inside);
        low += d * d;
        high += e * e;
    });
    return {count, mean, Simd::lane_total(low + high)};
}

void whiten(const float* x, RowMask mask, std::int64_t size, const WhiteningFactors& factors,
            float* out) {
    for (std::int64_t start = 0; start < size; start += Simd::kWidth) {
        const std::int64_t count = size - start;
        const Bytes bytes = load_bytes(mask, start, count);
        Floats white{};
        if (!all_are(bytes, 0)) {
            const Floats d = (Simd::load_some(x + start, count) - factors.mean_high) -
                             factors.mean_low;
            white = masked(d * factors.factor + factors.kept_mean, lanes_of(bytes));
        }
        Simd::store_some(out + start, white, count);
    }
}

}  // namespace advantages

constexpr AdvantageFunctions advantage_functions{advantages::kl_forward, advantages::kl_backward,
                                                 advantages::shape,      advantages::gae,
                                                 advantages::moments,    advantages::whiten};

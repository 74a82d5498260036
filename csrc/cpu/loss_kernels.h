// The losses on the CPU: the loops over a struct Simd, as in row_kernels.h. A vector of tokens of
// which none trains is not read.

namespace losses {

#include "policy_terms.h"

// Tokens summed in float32 before the sums go to double: 32 additions a lane.
constexpr std::int64_t kRun = 32 * Simd::kWidth;

// Sums of x and x^2 in double: a variance is their small difference.
struct MomentSums {
    Simd::Doubles sum{}, squares{};

    FUSERL_INLINE void add(Floats x) {
        const Simd::Doubles low = Simd::doubles<0>(x), high = Simd::doubles<1>(x);
        sum += low + high;
        squares += low * low + high * high;
    }
};

// Of lanes that each counted downwards, adding comparisons' results.
FUSERL_INLINE double lane_count(Words down) {
    return Simd::lane_sum(__builtin_convertvector(Words{} - down, Floats));
}

FUSERL_INLINE bool none_trains(const bool* loss_mask) {
    constexpr bool kNone[Simd::kWidth] = {};
    return std::memcmp(loss_mask, kNone, sizeof kNone) == 0;
}

// Call visit(token, mask, count) for the vectors of [first, last) where a token trains: `count`
// tokens from `token` on, of which the lanes of `mask` train; and skip(token) for the others.
template <typename Visit, typename Skip>
FUSERL_INLINE void each_trained(const bool* loss_mask, std::int64_t first, std::int64_t last,
                                const Visit& visit, const Skip& skip) {
    for (std::int64_t token = first; token < last; token += Simd::kWidth) {
        const std::int64_t count = last - token;
        if (count >= Simd::kWidth && none_trains(loss_mask + token))
            skip(token);
        else
            visit(token, load_mask(loss_mask + token, count), count);
    }
}

FUSERL_INLINE Floats load_trained(const float* source, Words mask, std::int64_t count) {
    return masked(Simd::load_some(source, count), mask);
}

// What the tokens of a sequence share.
struct Sequence {
    float log_ratio = 0.0f;             // for ratio levels other than token
    float correction_log_ratio = 0.0f;  // for correction levels other than token
    float advantage = 0.0f;             // with sequence_advantages
    float weight = 1.0f;                // the aggregation's, times the denominator
};

// The first walk over a sequence.
inline Sequence sequence_of(const PolicyLoss& task, std::int64_t number, Range tokens) {
    const bool ratios = task.ratio_level != Level::kToken;
    const bool corrects = task.rollout_logprobs && task.correction_level != Level::kToken;
    Sequence sequence;
    if (task.sequence_advantages) sequence.advantage = task.advantages[number];
    if (!task.sums_sequences()) return sequence;
    double count = 0.0, log_ratio = 0.0, correction = 0.0;
    for (std::int64_t first = tokens.first; first < tokens.last; first += kRun) {
        Words trained{};
        Floats log_ratios{}, log_corrections{};
        const std::int64_t last = first + kRun < tokens.last ? first + kRun : tokens.last;
        each_trained(
            task.loss_mask, first, last,
            [&](std::int64_t token, Words mask, std::int64_t width) FUSERL_LAMBDA {
                trained += mask;
                if (!ratios && !corrects) return;
                const Floats logprobs = load_trained(task.logprobs + token, mask, width);
                if (ratios)
                    log_ratios += load_trained(task.new_logprobs + token, mask, width) - logprobs;
                if (corrects)
                    log_corrections +=
                        logprobs - load_trained(task.rollout_logprobs + token, mask, width);
            },
            [](std::int64_t) FUSERL_LAMBDA {});
        count += lane_count(trained);
        log_ratio += Simd::lane_sum(log_ratios);
        correction += Simd::lane_sum(log_corrections);
    }
    const double length = count > 0.0 ? count : 1.0;
    const auto level = [&](double sum, Level of) {
        return static_cast<float>(of == Level::kSequenceSum ? sum : sum / length);
    };
    sequence.log_ratio = level(log_ratio, task.ratio_level);
    sequence.correction_log_ratio = level(correction, task.correction_level);
    if (task.aggregation == Aggregation::kSequenceMean)
        sequence.weight = static_cast<float>(1.0 / length);
    return sequence;
}

// The tokens [first, last), at most kRun. kPlain: ratios, weights and advantages of tokens, and no
// KL, entropy, correction or bound on the log-ratio.
template <bool kPlain, typename Surrogate>
FUSERL_INLINE void policy_run(const PolicyLoss& task, const Surrogate& surrogate,
                              const Sequence& sequence, std::int64_t first, std::int64_t last,
                              PolicySums& sums) {
    const bool spreads = !kPlain && task.spreads_gradient();
    const float log_ratio_clip = static_cast<float>(task.log_ratio_clip);
    const float weight = kPlain ? task.gradient_scale : sequence.weight * task.gradient_scale;
    const float kl_weight = static_cast<float>(task.kl_coef) * weight;
    const float entropy_weight = -static_cast<float>(task.entropy_coef) * weight;
    Floats term{}, squares{}, kl{}, entropy{}, correction{}, slope{};
    Words trained{}, clipped{}, corrected{};
    MomentSums excess;

    const auto visit = [&](std::int64_t token, Words mask, std::int64_t count) FUSERL_LAMBDA {
        const Floats new_logprobs = load_trained(task.new_logprobs + token, mask, count);
        const Floats logprobs = load_trained(task.logprobs + token, mask, count);
        const Floats token_log_ratio = new_logprobs - logprobs;
        Floats log_ratio = token_log_ratio;
        if (!kPlain && task.ratio_level != Level::kToken)
            log_ratio = masked(Simd::splat(sequence.log_ratio), mask);
        Floats bounded = log_ratio > kMaxLogRatio ? Simd::splat(kMaxLogRatio) : log_ratio;
        Words held{};  // by log_ratio_clip: no slope
        if (!kPlain && log_ratio_clip != 0.0f) {
            bounded = clamped(log_ratio, -log_ratio_clip, log_ratio_clip);
            held = Words(bounded != log_ratio);
        }
        Floats advantages = !kPlain && task.sequence_advantages
                                ? masked(Simd::splat(sequence.advantage), mask)
                                : load_trained(task.advantages + token, mask, count);
        if (!kPlain && task.rollout_logprobs) {
            const Floats own =
                task.correction_level == Level::kToken
                    ? logprobs - load_trained(task.rollout_logprobs + token, mask, count)
                    : Simd::splat(sequence.correction_log_ratio);
            const Corrections of = corrections(own, task);
            advantages = masked(advantages * of.factor, mask);
            correction += masked(of.factor, mask);
            corrected += of.outside & mask;
        }

        const Floats ratio = ratio_of(bounded);
        Term result = surrogate(new_logprobs, bounded, ratio, advantages);
        if (!kPlain && Surrogate::kThroughRatio) result.slope = zero_where(held, result.slope);
        trained += mask;
        term += result.term;
        clipped += result.clipped;
        squares += token_log_ratio * token_log_ratio;
        excess.add(ratio - 1.0f);
        Floats gradient = weight * result.slope;
        if (!kPlain) {
            if (spreads) {
                slope += result.slope;
                gradient = Floats{};
            }
            if (task.ref_logprobs) {
                const Floats ref = load_trained(task.ref_logprobs + token, mask, count);
                const Floats d = new_logprobs - ref;
                kl += kl_estimate(d, task.kl);
                if (kl_weight != 0.0f)
                    gradient = masked(gradient + kl_weight * kl_slope(d, task.kl), mask);
            }
            if (task.entropy) entropy += load_trained(task.entropy + token, mask, count);
            if (task.grad_entropy)
                Simd::store_some(task.grad_entropy + token,
                                 masked(Simd::splat(entropy_weight), mask), count);
        }
        if (task.grad_logprobs) Simd::store_some(task.grad_logprobs + token, gradient, count);
    };
    const auto skip = [&](std::int64_t token) FUSERL_LAMBDA {
        if (task.grad_logprobs) Simd::store(task.grad_logprobs + token, Floats{});
        if (!kPlain && task.grad_entropy) Simd::store(task.grad_entropy + token, Floats{});
    };
    each_trained(task.loss_mask, first, last, visit, skip);

    sums.tokens += lane_count(trained);
    sums.term += Simd::lane_sum(term);
    sums.log_ratio_squares += Simd::lane_sum(squares);
    sums.clipped += lane_count(clipped);
    sums.excess += Simd::lane_total(excess.sum);
    sums.excess_squares += Simd::lane_total(excess.squares);
    if (kPlain) return;
    sums.kl += Simd::lane_sum(kl);
    sums.entropy += Simd::lane_sum(entropy);
    sums.correction += Simd::lane_sum(correction);
    sums.corrected += lane_count(corrected);
    sums.slope += Simd::lane_sum(slope);
}

// Add the same number to the gradient of every trained token.
inline void spread_gradient(const PolicyLoss& task, Range tokens, float number) {
    each_trained(
        task.loss_mask, tokens.first, tokens.last,
        [&](std::int64_t token, Words mask, std::int64_t count) FUSERL_LAMBDA {
            float* gradient = task.grad_logprobs + token;
            Simd::store_some(gradient, masked(Simd::load_some(gradient, count) + number, mask),
                             count);
        },
        [](std::int64_t) FUSERL_LAMBDA {});
}

// One sequence, or tokens of no particular one.
template <bool kPlain, typename Surrogate>
void policy_tokens(const PolicyLoss& task, const Sequence& sequence, Range tokens,
                   PolicySums& sums) {
    const Surrogate surrogate(task);
    PolicySums own{};
    for (std::int64_t first = tokens.first; first < tokens.last; first += kRun) {
        const std::int64_t last = first + kRun < tokens.last ? first + kRun : tokens.last;
        policy_run<kPlain>(task, surrogate, sequence, first, last, own);
    }
    if (!kPlain && task.grad_logprobs && task.spreads_gradient()) {
        const double share = task.ratio_level == Level::kSequenceMean ? own.tokens : 1.0;
        const double total = own.slope * sequence.weight * task.gradient_scale;
        spread_gradient(task, tokens, static_cast<float>(own.tokens > 0.0 ? total / share : 0.0));
    }
    double objective = own.term;
    if (task.kl_coef != 0.0) objective += task.kl_coef * own.kl;
    if (task.entropy_coef != 0.0) objective -= task.entropy_coef * own.entropy;
    own.objective = objective * sequence.weight;
    own.sequences = own.tokens > 0.0 ? 1.0 : 0.0;
    sums += own;
}

using PolicyTokens = void (*)(const PolicyLoss&, const Sequence&, Range, PolicySums&);

inline PolicyTokens policy_tokens_of(const PolicyLoss& task) {
    switch (task.clip) {
        case Clip::kPpo: {
            const bool plain = !task.by_sequence() && !task.ref_logprobs && !task.entropy &&
                               !task.rollout_logprobs && task.log_ratio_clip == 0.0;
            return plain ? policy_tokens<true, PpoClip> : policy_tokens<false, PpoClip>;
        }
        case Clip::kCispo:
            return policy_tokens<false, CispoClip>;
        case Clip::kSapo:
            return policy_tokens<false, SapoGate>;
        case Clip::kVespo:
            return policy_tokens<false, VespoGate>;
        case Clip::kNone:
            break;
    }
    return policy_tokens<false, NoClip>;
}

FUSERL_INLINE void value_run(const ValueLoss& task, std::int64_t first, std::int64_t last,
                             ValueSums& sums) {
    const float clip_range = static_cast<float>(task.clip_range);
    Words trained{}, clipped{};
    Floats squares{};
    MomentSums returns, errors;
    each_trained(
        task.loss_mask, first, last,
        [&](std::int64_t token, Words mask, std::int64_t count) FUSERL_LAMBDA {
            const Floats value = load_trained(task.new_values + token, mask, count);
            const Floats old = load_trained(task.values + token, mask, count);
            const Floats target = load_trained(task.returns + token, mask, count);
            const Floats low = old - clip_range, high = old + clip_range;
            Floats bounded = value < low ? low : value;
            bounded = bounded > high ? high : bounded;
            const Floats error = value - target, clipped_error = bounded - target;
            const Words worse = Words(clipped_error * clipped_error > error * error);
            const Floats worst =
                clipped_error * clipped_error > error * error ? clipped_error : error;
            trained += mask;
            clipped += worse;
            squares += worst * worst;
            returns.add(target);
            errors.add(error);
            if (task.grad_values) {
                const Floats slope = zero_where(worse & Words(bounded != value), worst);
                Simd::store_some(task.grad_values + token, task.gradient_scale * slope, count);
            }
        },
        [&](std::int64_t token) FUSERL_LAMBDA {
            if (task.grad_values) Simd::store(task.grad_values + token, Floats{});
        });
    sums.tokens += lane_count(trained);
    sums.squares += Simd::lane_sum(squares);
    sums.clipped += lane_count(clipped);
    sums.returns += Simd::lane_total(returns.sum);
    sums.return_squares += Simd::lane_total(returns.squares);
    sums.errors += Simd::lane_total(errors.sum);
    sums.error_squares += Simd::lane_total(errors.squares);
}

inline void value_tokens(const ValueLoss& task, Range tokens, ValueSums& sums) {
    for (std::int64_t first = tokens.first; first < tokens.last; first += kRun)
        value_run(task, first, first + kRun < tokens.last ? first + kRun : tokens.last, sums);
}

// The policy loss of an item's tokens, which it returns.
inline Range policy_item(const Losses& losses, std::int64_t item, PolicySums& sums) {
    const PolicyLoss& task = *losses.policy;
    const PolicyTokens run = policy_tokens_of(task);
    const std::int64_t share = losses.sequences_per_item();
    const std::int64_t first = item * share;
    const std::int64_t last =
        first + share < losses.num_sequences ? first + share : losses.num_sequences;
    for (std::int64_t number = first; number < last; ++number) {
        const Range tokens = losses.tokens_of_sequence(number);
        run(task, sequence_of(task, number, tokens), tokens, sums);
    }
    return {losses.tokens_of_sequence(first).first, losses.tokens_of_sequence(last - 1).last};
}

inline void items(const Losses& losses, std::int64_t first, std::int64_t last, LossSums* sums) {
    const FlushSubnormals flush;
    for (std::int64_t item = first; item < last; ++item) {
        Range tokens;
        if (losses.by_sequence()) {
            tokens = policy_item(losses, item, sums[item].policy);
        } else {
            tokens.first = item * Losses::kItemTokens;
            tokens.last = tokens.first + Losses::kItemTokens;
            if (tokens.last > losses.num_tokens) tokens.last = losses.num_tokens;
            if (losses.policy)
                policy_tokens_of(*losses.policy)(*losses.policy, Sequence{}, tokens,
                                                 sums[item].policy);
        }
        if (losses.value) value_tokens(*losses.value, tokens, sums[item].value);
    }
}

}  // namespace losses

constexpr LossFunctions loss_functions{losses::items};

// Policy and value losses with their gradients and metrics, on the CPU: the tokens are read once,
// and once more where an option looks at whole sequences.
//
// Flat float32 tensors of num_tokens, arithmetic in float32, sums in double. The tokens are cut
// into items by their number and their sequences alone; each item has its own sums, which are
// added in order, so that the number of threads changes no bit. Formulas:
// kernels/fuserl_kernels/reference/policy.py and value.py.
#pragma once

#include <cstdint>
#include <optional>

#include "kl_options.h"

namespace fuserl {

enum class Level { kToken, kSequenceSum, kSequenceMean, kSequenceMeanToken };
enum class Clip { kPpo, kCispo, kSapo, kVespo, kNone };
enum class Aggregation { kTokenMean, kSequenceMean, kSequenceSum };
enum class Correction { kNone, kTruncate, kMask, kReject };

// The options are the reference's: 0 stands for none in dual_clip and log_ratio_clip.
struct PolicyLoss {
    const float* new_logprobs;
    const float* logprobs;
    const float* advantages;  // [num_tokens], or [num_sequences] with sequence_advantages
    bool sequence_advantages;
    const bool* loss_mask;
    const float* ref_logprobs;      // or null
    const float* entropy;           // or null
    const float* rollout_logprobs;  // or null, without a correction
    std::optional<double> denominator;
    Level ratio_level;
    Clip clip;
    double clip_low, clip_high, dual_clip;
    double gate_pos, gate_neg, gate_rate_pos, gate_rate_neg;
    double log_ratio_clip;
    Aggregation aggregation;
    double kl_coef;
    KlOptions kl;
    double entropy_coef;
    Correction correction;
    Level correction_level;
    double correction_low, correction_high;
    float* grad_logprobs;  // or null
    float* grad_entropy;   // or null
    float gradient_scale = 1.0f;

    // The gradient goes through the ratio of the whole sequence.
    bool spreads_gradient() const {
        return (ratio_level == Level::kSequenceSum || ratio_level == Level::kSequenceMean) &&
               clip != Clip::kCispo && clip != Clip::kVespo;
    }

    // Whole sequences must be summed before the terms of their tokens are known.
    bool sums_sequences() const {
        return ratio_level != Level::kToken || aggregation == Aggregation::kSequenceMean ||
               (rollout_logprobs != nullptr && correction_level != Level::kToken);
    }

    bool by_sequence() const {
        return sums_sequences() || sequence_advantages || aggregation != Aggregation::kTokenMean;
    }
};

struct ValueLoss {
    const float* new_values;
    const float* values;
    const float* returns;
    const bool* loss_mask;
    double clip_range;  // infinite for none
    double coef;        // of this loss in the total
    std::optional<double> denominator;
    float* grad_values;  // or null
    float gradient_scale = 1.0f;
};

struct Range {
    std::int64_t first, last;
};

// What is computed, and where its tokens lie.
struct Losses {
    const PolicyLoss* policy;  // or null
    const ValueLoss* value;    // or null
    std::int64_t num_tokens;
    std::int64_t num_sequences;      // 0 where nobody asks
    const std::int64_t* cu_seqlens;  // [num_sequences + 1], or null for sequences of one length
    // Multiply the gradients by their scales, which are 1 then. It takes a look at the masks before
    // the walk, and can spare backward a walk over the gradients.
    bool scale_gradients;

    static constexpr std::int64_t kItemTokens = 4096;  // about; sequences stay whole

    bool by_sequence() const { return policy != nullptr && policy->by_sequence(); }
    std::int64_t sequences_per_item() const;
    std::int64_t num_items() const;

    Range tokens_of_sequence(std::int64_t sequence) const {
        if (cu_seqlens != nullptr) return {cu_seqlens[sequence], cu_seqlens[sequence + 1]};
        const std::int64_t length = num_tokens / num_sequences;
        return {sequence * length, (sequence + 1) * length};
    }
};

// Sums over trained tokens.
struct PolicySums {
    double tokens, sequences;  // sequences: those with a trained token
    double objective;          // what the loss is before its denominator
    double term, log_ratio_squares, clipped;
    double excess, excess_squares;  // of the ratio over 1
    double kl, entropy, correction, corrected;
    double slope;  // of one sequence

    PolicySums& operator+=(const PolicySums& more) {
        tokens += more.tokens;
        sequences += more.sequences;
        objective += more.objective;
        term += more.term;
        log_ratio_squares += more.log_ratio_squares;
        clipped += more.clipped;
        excess += more.excess;
        excess_squares += more.excess_squares;
        kl += more.kl;
        entropy += more.entropy;
        correction += more.correction;
        corrected += more.corrected;
        slope += more.slope;
        return *this;
    }
};

// Sums over value slots.
struct ValueSums {
    double tokens, squares, clipped;
    double returns, return_squares, errors, error_squares;

    ValueSums& operator+=(const ValueSums& more) {
        tokens += more.tokens;
        squares += more.squares;
        clipped += more.clipped;
        returns += more.returns;
        return_squares += more.return_squares;
        errors += more.errors;
        error_squares += more.error_squares;
        return *this;
    }
};

struct LossSums {
    PolicySums policy;
    ValueSums value;
};

// Writes loss [1]; metrics, the policy's ten and the value's four, in the order of METRICS; and
// scales, the policy's 1 / denominator and the value's coef / denominator: what the gradients are
// still to be multiplied by.
void policy_and_value_losses(const Losses& losses, float* loss, float* metrics, float* scales,
                             int num_threads);

// What instruction sets have versions of: the items [first, last), each with sums of its own.
struct LossFunctions {
    void (*items)(const Losses& losses, std::int64_t first, std::int64_t last, LossSums* sums);
};

}  // namespace fuserl

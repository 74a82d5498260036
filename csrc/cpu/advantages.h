// From scores to advantages on the CPU: KL penalty, reward shaping, GAE and whitening.
//
// Everything is float32 and contiguous, masks are bool bytes; sums over tokens are double. A row's
// result depends on nothing but the row and the instruction set; sums over rows are taken in their
// order, so the number of threads changes no bit. What a mask leaves out is never used. Formulas:
// kernels/fuserl_kernels/reference/rewards.py.
#pragma once

#include <cstdint>

#include "kl_options.h"

namespace fuserl {

enum class MissingEos { kNone, kReplace, kSubtract };

struct KlPenalty {
    const float* logprobs;  // [size], and so are all others
    const float* ref_logprobs;
    std::int64_t size;
    KlOptions kl;
    const float* grad;         // backward: of the estimate
    float* out;                // forward: the estimate; backward: the gradient of logprobs
    float* grad_ref_logprobs;  // backward
};

struct Shaping {
    const float* scores;        // [num_rows], or [num_rows, num_slots] if each slot has one
    bool each_slot;
    const float* logprobs;      // [num_rows, num_slots], and so are ref_logprobs and loss_mask
    const float* ref_logprobs;
    const bool* loss_mask;
    const bool* has_eos;        // [num_rows], or null
    std::int64_t num_rows;
    std::int64_t num_slots;
    KlOptions kl;
    float kl_coef;
    bool after;                 // the score goes behind the last token, or else on it
    std::int64_t limit;         // and with `after` to a slot below this
    float score_clip;
    float score_scale;
    MissingEos missing_eos;
    float missing_eos_penalty;
    float* rewards;             // [num_rows, num_slots], and so is kl_out
    float* kl_out;
};

// One recursion serves GAE and returns. With rewards r and values v, 0 where there is none,
//     X_t = gamma lambda (r_t + X_{t+1}) + gamma (1 - lambda) v_t
//     return_t = r_t + X_{t+1},  advantage_t = return_t - v_t
// at a slot of either mask. A hole keeps X, or decays it as if it held zeros ("carry").
class Discount {
   public:
    static constexpr int kMostLanes = 16;

    Discount(double gamma, double gae_lambda, bool carry);

    float powers[kMostLanes + 1];  // of gamma lambda
    float value_weight;            // gamma (1 - lambda)
    bool carry;
};

struct Gae {
    const float* rewards;      // [num_rows, num_slots], or packed
    const float* values;       // likewise, or null for zeros
    const bool* loss_mask;
    const bool* value_mask;
    std::int64_t num_rows;
    std::int64_t num_slots;
    const std::int64_t* starts;  // packed: [num_rows + 1], where each row begins; or null
    Discount discount;
    float* advantages;         // 0 outside loss_mask
    float* returns;            // 0 outside value_mask; or null
};

// Of a set: count, mean, and the sum of squared deviations from it.
struct Moments {
    double count, mean, squares;
};

struct Whitening {
    const float* x;     // [size], and so are mask and out
    const bool* mask;
    std::int64_t size;
    const Moments* moments;  // [num_parts], of the parts that are whitened together; null: of x
    std::int64_t num_parts;
    bool shift_mean;
    bool unbiased;
    float* out;
};

struct RewardsToAdvantages {
    Shaping shaping;
    const float* values;  // [num_rows, num_slots], and so are advantages and returns
    Discount discount;
    bool whiten;
    bool whiten_rewards;
    bool unbiased;
    float* advantages;
    float* returns;
};

void kl_penalty_forward(const KlPenalty& task, int num_threads);
void kl_penalty_backward(const KlPenalty& task, int num_threads);
void shape_rewards(const Shaping& task, int num_threads);
void gae(const Gae& task, int num_threads);
Moments masked_moments(const float* x, const bool* mask, std::int64_t size, int num_threads);
void masked_whiten(const Whitening& task, int num_threads);
void rewards_to_advantages(const RewardsToAdvantages& task, int num_threads);

// --- one row, which is what instruction sets have versions of

// The slots of a row's mask, and one more unless that is -1.
struct RowMask {
    const bool* slots;
    std::int64_t extra;
};

struct ShapingRow {
    const float* logprobs;
    const float* ref_logprobs;
    const bool* loss_mask;
    const float* scores;  // one each slot, or null
    float score;          // or this one
    std::int64_t slot;    // at this slot; -1 for nowhere
    float* rewards;
    float* kl;
};

struct GaeRow {
    const float* rewards;
    const float* values;  // or null
    RowMask loss_mask;
    RowMask value_mask;
    std::int64_t size;
    float* advantages;
    float* returns;  // or null
};

// out = (x - mean) * factor + kept_mean, the mean in two floats.
struct WhiteningFactors {
    float mean_high, mean_low, factor, kept_mean;
};

struct AdvantageFunctions {
    void (*kl_forward)(const KlPenalty& task, std::int64_t first, std::int64_t last);
    void (*kl_backward)(const KlPenalty& task, std::int64_t first, std::int64_t last);
    void (*shape)(const Shaping& task, const ShapingRow& row);
    void (*gae)(const Discount& discount, const GaeRow& row);
    Moments (*moments)(const float* x, RowMask mask, std::int64_t size);
    void (*whiten)(const float* x, RowMask mask, std::int64_t size, const WhiteningFactors& factors,
                   float* out);
};

}  // namespace fuserl

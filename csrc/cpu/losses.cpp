#include "losses.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernel_functions.h"
#include "parallel.h"

namespace fuserl {
namespace {

// A token's cost to parallel_rows, which counts elements that are read and written.
constexpr std::int64_t kTokenElements = 8;

constexpr double kLeastSpread = 1e-14;  // LEAST_SPREAD of reference/value.py

// What a sum is divided by: the caller's number or the count of this call, and 1 instead of 0.
double divisor(const std::optional<double>& denominator, double count) {
    const double number = denominator.value_or(count);
    return number == 0.0 ? 1.0 : number;
}

// The number of true bytes, eight at a time: each byte of `lanes` counts at most 255 of them.
double count_true(const bool* mask, std::int64_t size) {
    constexpr std::uint64_t kOdd = 0x00ff00ff00ff00ff;
    std::uint64_t count = 0;
    std::int64_t at = 0;
    while (at + 8 <= size) {
        const std::int64_t stop = std::min(at + 255 * 8, size - 7);
        std::uint64_t lanes = 0;
        for (; at < stop; at += 8) {
            std::uint64_t eight;
            std::memcpy(&eight, mask + at, sizeof eight);
            lanes += eight;
        }
        const std::uint64_t pairs = (lanes & kOdd) + (lanes >> 8 & kOdd);
        count += pairs * 0x0001000100010001 >> 48;
    }
    for (; at < size; ++at) count += mask[at];
    return static_cast<double>(count);
}

double count_trained_sequences(const Losses& losses) {
    double count = 0.0;
    for (std::int64_t number = 0; number < losses.num_sequences; ++number) {
        const Range tokens = losses.tokens_of_sequence(number);
        const bool* mask = losses.policy->loss_mask + tokens.first;
        const auto length = static_cast<std::size_t>(tokens.last - tokens.first);
        if (length > 0 && std::memchr(mask, 1, length) != nullptr) count += 1.0;
    }
    return count;
}

// The divisors of the two losses, before anything else is known.
double policy_divisor(const Losses& losses) {
    const PolicyLoss& task = *losses.policy;
    if (task.denominator) return divisor(task.denominator, 0.0);
    const bool by_token = task.aggregation == Aggregation::kTokenMean;
    return divisor({}, by_token ? count_true(task.loss_mask, losses.num_tokens)
                                : count_trained_sequences(losses));
}

double value_divisor(const Losses& losses) {
    const ValueLoss& task = *losses.value;
    if (task.denominator) return divisor(task.denominator, 0.0);
    return divisor({}, count_true(task.loss_mask, losses.num_tokens));
}

// NaN stays NaN.
double variance(double sum, double squares, double count) {
    const double mean = sum / count;
    const double result = squares / count - mean * mean;
    return result < 0.0 ? 0.0 : result;
}

void write_metrics(const PolicyLoss& task, const PolicySums& sums, float*& metrics) {
    const double count = std::max(sums.tokens, 1.0);
    const double ones = sums.tokens > 0.0 ? 1.0 : 0.0;
    const double correction = task.rollout_logprobs ? sums.correction / count : ones;
    for (const double metric :
         {sums.term / count, 0.5 * sums.log_ratio_squares / count, sums.clipped / count,
          ones + sums.excess / count, variance(sums.excess, sums.excess_squares, count),
          sums.kl / count, sums.entropy / count, correction, sums.corrected / count, sums.tokens})
        *metrics++ = static_cast<float>(metric);
}

void write_metrics(const ValueSums& sums, float*& metrics) {
    const double count = std::max(sums.tokens, 1.0);
    const double spread = variance(sums.returns, sums.return_squares, count);
    const double errors = variance(sums.errors, sums.error_squares, count);
    const bool varies = spread > kLeastSpread * (sums.return_squares / count);
    const double explained = varies ? 1.0 - errors / spread : 0.0;
    for (const double metric :
         {0.5 * sums.squares / count, sums.clipped / count, explained, sums.tokens})
        *metrics++ = static_cast<float>(metric);
}

}  // namespace

std::int64_t Losses::sequences_per_item() const {
    const std::int64_t length = std::max<std::int64_t>(1, num_tokens / num_sequences);
    return std::max<std::int64_t>(1, kItemTokens / length);
}

std::int64_t Losses::num_items() const {
    if (!by_sequence()) return (num_tokens + kItemTokens - 1) / kItemTokens;
    if (num_sequences == 0) return 0;
    const std::int64_t share = sequences_per_item();
    return (num_sequences + share - 1) / share;
}

void policy_and_value_losses(const Losses& given, float* loss, float* metrics, float* scales,
                             int num_threads) {
    Losses losses = given;
    PolicyLoss policy;
    ValueLoss value;
    if (losses.scale_gradients && losses.policy) {
        policy = *losses.policy;
        policy.gradient_scale = static_cast<float>(1.0 / policy_divisor(losses));
        losses.policy = &policy;
    }
    if (losses.scale_gradients && losses.value) {
        value = *losses.value;
        value.gradient_scale = static_cast<float>(value.coef / value_divisor(losses));
        losses.value = &value;
    }

    const std::int64_t num_items = losses.num_items();
    std::vector<LossSums> parts(static_cast<std::size_t>(num_items));
    const auto items = kernel_functions().losses.items;
    const std::int64_t item_tokens = losses.num_tokens / std::max<std::int64_t>(1, num_items);
    parallel_rows(num_items, std::max<std::int64_t>(1, item_tokens) * kTokenElements, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      items(losses, first, last, parts.data());
                  });
    LossSums sums{};
    for (const LossSums& part : parts) {
        sums.policy += part.policy;
        sums.value += part.value;
    }

    double total = 0.0;
    const auto finish = [&](double sum, double coef, double number) {
        total += coef * (sum / number);
        *scales++ = losses.scale_gradients ? 1.0f : static_cast<float>(coef / number);
    };
    if (losses.policy) {
        const bool by_token = losses.policy->aggregation == Aggregation::kTokenMean;
        const double count = by_token ? sums.policy.tokens : sums.policy.sequences;
        finish(sums.policy.objective, 1.0, divisor(losses.policy->denominator, count));
        write_metrics(*losses.policy, sums.policy, metrics);
    }
    if (losses.value) {
        const double number = divisor(losses.value->denominator, sums.value.tokens);
        finish(0.5 * sums.value.squares, losses.value->coef, number);
        write_metrics(sums.value, metrics);
    }
    *loss = static_cast<float>(total);
}

}  // namespace fuserl

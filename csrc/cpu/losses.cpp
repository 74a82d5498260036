#include "losses.h"

#include <algorithm>
#include <vector>

#include "kernel_functions.h"
#include "parallel.h"

namespace fuserl {
namespace {

// A token's cost to parallel_rows, which counts elements that are read and written.
constexpr std::int64_t kTokenElements = 8;

// What a sum is divided by: the caller's number or the count of this call, and 1 instead of 0.
double divisor(const std::optional<double>& denominator, double count) {
    const double number = denominator.value_or(count);
    return number == 0.0 ? 1.0 : number;
}

// NaN stays NaN.
double variance(double sum, double squares, double count) {
    const double mean = sum / count;
    const double result = squares / count - mean * mean;
    return result < 0.0 ? 0.0 : result;
}

// Returns the loss.
double finish(const PolicyLoss& task, const PolicySums& sums, float*& metrics, float*& scales) {
    const double count = std::max(sums.tokens, 1.0);
    const double ones = sums.tokens > 0.0 ? 1.0 : 0.0;
    const double correction = task.rollout_logprobs ? sums.correction / count : ones;
    for (const double metric :
         {sums.term / count, 0.5 * sums.log_ratio_squares / count, sums.clipped / count,
          ones + sums.excess / count, variance(sums.excess, sums.excess_squares, count),
          sums.kl / count, sums.entropy / count, correction, sums.corrected / count, sums.tokens})
        *metrics++ = static_cast<float>(metric);
    const bool by_token = task.aggregation == Aggregation::kTokenMean;
    const double number = divisor(task.denominator, by_token ? sums.tokens : sums.sequences);
    *scales++ = static_cast<float>(1.0 / number);
    return sums.objective / number;
}

double finish(const ValueLoss& task, const ValueSums& sums, float*& metrics, float*& scales) {
    const double count = std::max(sums.tokens, 1.0);
    const double squares = 0.5 * sums.squares;
    const double spread = variance(sums.returns, sums.return_squares, count);
    const double errors = variance(sums.errors, sums.error_squares, count);
    const double explained = spread > 0.0 ? 1.0 - errors / spread : 0.0;
    for (const double metric : {squares / count, sums.clipped / count, explained, sums.tokens})
        *metrics++ = static_cast<float>(metric);
    const double number = divisor(task.denominator, sums.tokens);
    *scales++ = static_cast<float>(task.coef / number);
    return task.coef * squares / number;
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

void policy_and_value_losses(const Losses& losses, float* loss, float* metrics, float* scales,
                             int num_threads) {
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
    if (losses.policy) total += finish(*losses.policy, sums.policy, metrics, scales);
    if (losses.value) total += finish(*losses.value, sums.value, metrics, scales);
    *loss = static_cast<float>(total);
}

}  // namespace fuserl

#include "advantages.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernel_functions.h"
#include "parallel.h"

namespace fuserl {
namespace {

constexpr double kWhitenEpsilon = 1e-8;
constexpr std::int64_t kChunk = 4096;  // elements of a flat tensor that make a row

const AdvantageFunctions& functions() { return kernel_functions().advantages; }

// Call run(first, last) on elements that cover [0, size) once.
template <typename Run>
void parallel_chunks(std::int64_t size, std::int64_t num_tensors, int num_threads, const Run& run) {
    parallel_rows((size + kChunk - 1) / kChunk, kChunk * num_tensors, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      for (std::int64_t chunk = first; chunk < last; ++chunk)
                          run(chunk * kChunk, std::min((chunk + 1) * kChunk, size));
                  });
}

// The last true slot, or -1.
std::int64_t last_slot(const bool* mask, std::int64_t num_slots) {
    std::int64_t stop = num_slots;
    for (std::uint64_t bytes = 0; stop >= 8; stop -= 8) {
        std::memcpy(&bytes, mask + stop - 8, sizeof bytes);
        if (bytes != 0) break;
    }
    while (stop > 0 && !mask[stop - 1]) --stop;
    return stop - 1;
}

// Where the row's score goes: -1 for nowhere, as in a row without a token.
std::int64_t score_slot(const Shaping& task, std::int64_t row) {
    const std::int64_t last = last_slot(task.loss_mask + row * task.num_slots, task.num_slots);
    return last >= 0 && task.after ? std::min(last + 1, task.limit - 1) : last;
}

float shaped_score(const Shaping& task, std::int64_t row) {
    float score = task.scores[row];
    score = score > task.score_clip ? task.score_clip : score;
    score = score < -task.score_clip ? -task.score_clip : score;
    score *= task.score_scale;
    if (task.missing_eos == MissingEos::kNone || task.has_eos[row]) return score;
    return task.missing_eos == MissingEos::kReplace ? -task.missing_eos_penalty
                                                    : score - task.missing_eos_penalty;
}

// Shapes one row and returns the slot of its score, or -1.
std::int64_t shape_row(const Shaping& task, std::int64_t row) {
    const std::int64_t at = row * task.num_slots;
    const std::int64_t slot = task.each_slot ? -1 : score_slot(task, row);
    functions().shape(task, {task.logprobs + at, task.ref_logprobs + at, task.loss_mask + at,
                             task.each_slot ? task.scores + at : nullptr,
                             task.each_slot ? 0.0f : shaped_score(task, row), slot,
                             task.rewards + at, task.kl_out + at});
    return slot;
}

// Of all parts together, in their order.
Moments merged(const Moments* parts, std::int64_t num_parts) {
    Moments all{0.0, 0.0, 0.0};
    for (std::int64_t i = 0; i < num_parts; ++i) {
        all.count += parts[i].count;
        all.mean += parts[i].count * parts[i].mean;
    }
    all.mean /= std::max(all.count, 1.0);
    for (std::int64_t i = 0; i < num_parts; ++i) {
        const double d = parts[i].mean - all.mean;
        all.squares += parts[i].squares + parts[i].count * d * d;
    }
    return all;
}

WhiteningFactors factors_of(const Moments& moments, bool shift_mean, bool unbiased) {
    const double variance = moments.squares / std::max(moments.count - (unbiased ? 1.0 : 0.0), 1.0);
    const float mean = static_cast<float>(moments.mean);
    return {mean, static_cast<float>(moments.mean - mean),
            static_cast<float>(1.0 / std::sqrt(variance + kWhitenEpsilon)),
            shift_mean ? 0.0f : mean};
}

}  // namespace

Discount::Discount(double gamma, double gae_lambda, bool carry_through)
    : value_weight(static_cast<float>(gamma * (1.0 - gae_lambda))), carry(carry_through) {
    double power = 1.0;
    for (float& x : powers) {
        x = static_cast<float>(power);
        power *= gamma * gae_lambda;
    }
}

void kl_penalty_forward(const KlPenalty& task, int num_threads) {
    const auto run = functions().kl_forward;
    parallel_chunks(task.size, 3, num_threads, [&](std::int64_t first, std::int64_t last) {
        run(task, first, last);
    });
}

void kl_penalty_backward(const KlPenalty& task, int num_threads) {
    const auto run = functions().kl_backward;
    parallel_chunks(task.size, 5, num_threads, [&](std::int64_t first, std::int64_t last) {
        run(task, first, last);
    });
}

void shape_rewards(const Shaping& task, int num_threads) {
    parallel_rows(task.num_rows, 4 * task.num_slots, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      for (std::int64_t row = first; row < last; ++row) shape_row(task, row);
                  });
}

void gae(const Gae& task, int num_threads) {
    const auto run = functions().gae;
    const std::int64_t rows = std::max<std::int64_t>(task.num_rows, 1);
    const std::int64_t row_size = task.starts ? task.starts[task.num_rows] / rows : task.num_slots;
    parallel_rows(task.num_rows, 4 * row_size, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t row = first; row < last; ++row) {
            const std::int64_t at = task.starts ? task.starts[row] : row * task.num_slots;
            const std::int64_t size = task.starts ? task.starts[row + 1] - at : task.num_slots;
            run(task.discount, {task.rewards + at, task.values ? task.values + at : nullptr,
                                {task.loss_mask + at, -1}, {task.value_mask + at, -1}, size,
                                task.advantages + at, task.returns ? task.returns + at : nullptr});
        }
    });
}

Moments masked_moments(const float* x, const bool* mask, std::int64_t size, int num_threads) {
    const auto run = functions().moments;
    std::vector<Moments> parts(static_cast<std::size_t>((size + kChunk - 1) / kChunk));
    parallel_chunks(size, 1, num_threads, [&](std::int64_t first, std::int64_t last) {
        parts[first / kChunk] = run(x + first, {mask + first, -1}, last - first);
    });
    return merged(parts.data(), static_cast<std::int64_t>(parts.size()));
}

void masked_whiten(const Whitening& task, int num_threads) {
    const auto run = functions().whiten;
    const Moments moments = task.moments
                                ? merged(task.moments, task.num_parts)
                                : masked_moments(task.x, task.mask, task.size, num_threads);
    const WhiteningFactors factors = factors_of(moments, task.shift_mean, task.unbiased);
    parallel_chunks(task.size, 2, num_threads, [&](std::int64_t first, std::int64_t last) {
        run(task.x + first, {task.mask + first, -1}, last - first, factors, task.out + first);
    });
}

// Row after row, so that each step finds what it needs in the cache.
void rewards_to_advantages(const RewardsToAdvantages& task, int num_threads) {
    const Shaping& shaping = task.shaping;
    const std::int64_t num_rows = shaping.num_rows, num_slots = shaping.num_slots;
    const AdvantageFunctions& run = functions();
    std::vector<std::int64_t> slots(static_cast<std::size_t>(num_rows));
    std::vector<Moments> parts(static_cast<std::size_t>(num_rows));
    const auto value_mask = [&](std::int64_t row) {
        return RowMask{shaping.loss_mask + row * num_slots, slots[row]};
    };
    const auto advantages_of = [&](std::int64_t row) {
        const std::int64_t at = row * num_slots;
        run.gae(task.discount,
                {shaping.rewards + at, task.values + at, {shaping.loss_mask + at, -1},
                 value_mask(row), num_slots, task.advantages + at, task.returns + at});
        if (task.whiten)
            parts[row] = run.moments(task.advantages + at, {shaping.loss_mask + at, -1}, num_slots);
    };

    parallel_rows(num_rows, 8 * num_slots, num_threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t row = first; row < last; ++row) {
            slots[row] = shape_row(shaping, row);
            if (task.whiten_rewards)
                parts[row] = run.moments(shaping.rewards + row * num_slots, value_mask(row),
                                         num_slots);
            else
                advantages_of(row);
        }
    });
    if (task.whiten_rewards) {
        const WhiteningFactors factors =
            factors_of(merged(parts.data(), num_rows), false, task.unbiased);
        parallel_rows(num_rows, 5 * num_slots, num_threads,
                      [&](std::int64_t first, std::int64_t last) {
            for (std::int64_t row = first; row < last; ++row) {
                float* rewards = shaping.rewards + row * num_slots;
                run.whiten(rewards, value_mask(row), num_slots, factors, rewards);
                advantages_of(row);
            }
        });
    }
    if (!task.whiten) return;
    const WhiteningFactors factors =
        factors_of(merged(parts.data(), num_rows), true, task.unbiased);
    parallel_rows(num_rows, 2 * num_slots, num_threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t row = first; row < last; ++row) {
            float* advantages = task.advantages + row * num_slots;
            run.whiten(advantages, {shaping.loss_mask + row * num_slots, -1}, num_slots, factors,
                       advantages);
        }
    });
}

}  // namespace fuserl

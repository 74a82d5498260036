#include "sampling.h"

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../cpu/philox.h"
#include "truncation.cuh"

namespace fuserl::cuda {
namespace {

// How a token is chosen: types, so that a kernel's name tells.
struct Greedy {};
struct Plain {};
struct Truncated {};

template <typename Mode, typename Other>
constexpr bool kIs = std::is_same_v<Mode, Other>;

// What a thread needs of the options, as the Triton kernel has them.
struct Options {
    float temperature;  // 1 for the largest logit
    int top_k;          // 0 for all
    double top_p;
    bool has_floor;
    float floor;  // temperature * log(min_p): below it x - maximum is not kept
};

template <typename Row>
__device__ void kept_lane_masses(const Row& row, const Kept& kept, float row_max, float scale,
                                 Mass (&out)[kShare]) {
    float masses[kShare] = {};
    row.template each<Walk::kUp>([&](float x, Where where) {
        if (kept.has(x, where.column)) masses[where.lane] += weight(x, row_max, scale);
    });
#pragma unroll
    for (int lane = 0; lane < kShare; ++lane) out[lane] = fixed(masses[lane]);
}

// top_k, then top_p of what it leaves, then min_p: each takes a prefix of what it gets.
template <typename Row>
__device__ Kept truncate(const Row& row, const Options& options, float row_max, float scale,
                         TruncationStorage& storage, Mass (&lane_masses)[kShare]) {
    const bool limits_count = options.top_k > 0, limits_mass = options.top_p < 1.0;
    const bool is_prefix = limits_count || limits_mass;
    Kept kept{-INFINITY, row.size() - 1};
    if (is_prefix) {
        Truncation<Row> truncation(row, row_max, scale, limits_count, limits_mass, storage);
        // A loop, not two calls, as device code is inlined: half the instructions to fetch.
#pragma unroll 1
        for (int stage = 0; stage < 2; ++stage) {
            const bool of_mass = stage == 1;
            if (of_mass ? !limits_mass : !limits_count) continue;
            truncation.bin();
            Goal goal{of_mass, options.top_k};
            if (of_mass) {
                const Mass whole = limits_count ? truncation.mass() : truncation.total_mass();
                const double share = ceil(static_cast<double>(whole) * options.top_p);
                goal.amount = max(Mass{1}, min(static_cast<Mass>(share), whole));
            }
            kept = truncation.find(goal);
        }
        truncation.lane_masses(lane_masses);
    }
    const auto reaches_floor = [&](float x) { return x - row_max >= options.floor; };
    if (options.has_floor && !(is_prefix && reaches_floor(kept.value))) {
        kept = {value_of(first_key(row_max, reaches_floor)), row.size() - 1};
        kept_lane_masses(row, kept, row_max, scale, lane_masses);
    }
    return kept;
}

// Column of the first kept entry, lane by lane, whose cumulative mass exceeds u times the total.
// The lane's own entries are weighed relative to the largest of them and cut to the lane's share,
// so the column has mass whatever was rounded.
template <typename Row>
__device__ int draw(const Row& row, const Cumulative& lanes, std::uint64_t uniform_bits,
                    const Kept& kept, float scale) {
    const auto total = static_cast<unsigned long long>(lanes.total());
    const auto lane = lanes.past(static_cast<Mass>(__umul64hi(uniform_bits << 11, total)));
    const double part = static_cast<double>(__umul64hi(uniform_bits << 11, total) - lane.before) /
                        static_cast<double>(lane.own);

    float x[kShare], largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int column = (first_slot() + i) * kLanes + lane.slot;
        x[i] = first_slot() + i < row.turns() && column < row.size() ? row.at(column) : -INFINITY;
        if (!kept.has(x[i], column)) x[i] = -INFINITY;
        largest = fmaxf(largest, x[i]);
    }
    largest = maximum(largest);
    Mass entries[kShare];
#pragma unroll
    for (int i = 0; i < kShare; ++i) entries[i] = fixed(weight(x[i], largest, scale));
    const Cumulative turns(entries);
    const Mass target = static_cast<Mass>(part * static_cast<double>(turns.total()));
    return turns.past(min(target, turns.total() - 1)).slot * kLanes + lane.slot;
}

template <typename T, bool kAligned, typename Mode>
__global__ void __launch_bounds__(kThreads, 2) sample_row(Sampling task, Options options) {
    const std::int64_t index = blockIdx.x;
    const Row<T, kAligned> row(static_cast<const T*>(task.logits) + index * task.row_stride,
                               static_cast<int>(task.vocab_size));
    const float scale = divide_approximate(kLog2E, options.temperature);
    LaneStatistics statistics;
    statistics.read<kIs<Mode, Greedy>>(row, scale);
    const float row_max = statistics.row_maximum();
    float sums[kShare];
    statistics.sums(row_max, scale, sums);
    const float log_sum = logf(sum_lanes(sums));

    int token_id = -1;
    float kept_log_sum = log_sum;
    const bool is_distribution = log_sum == log_sum && row_max != -INFINITY;
    if (is_distribution) {
        if constexpr (kIs<Mode, Greedy>) {
            token_id = statistics.largest(row_max);
        } else {
            Mass masses[kShare];
            Kept kept{-INFINITY, row.size() - 1};
            if constexpr (kIs<Mode, Truncated>) {
                __shared__ TruncationStorage storage;
                kept = truncate(row, options, row_max, scale, storage, masses);
            } else {
#pragma unroll
                for (int lane = 0; lane < kShare; ++lane) masses[lane] = fixed(sums[lane]);
            }
            const Cumulative lanes(masses);
            if (kIs<Mode, Truncated>)
                kept_log_sum = logf(static_cast<float>(lanes.total()) / kFixedOne);
            const std::uint64_t bits =
                uniform_bits(task.seed, task.request_ids[index], task.positions[index]);
            token_id = draw(row, lanes, bits, kept, scale);
        }
    }
    if (threadIdx.x != 0) return;
    float logprob = NAN, truncated = NAN;
    if (is_distribution) {
        const float x = divide_approximate(row.at(token_id) - row_max, options.temperature);
        logprob = x - log_sum;
        truncated = kIs<Mode, Greedy> ? 0.0f : x - kept_log_sum;
    }
    task.token_ids[index] = token_id;
    task.logprobs[index] = logprob;
    task.truncated_logprobs[index] = truncated;
}

void check(cudaError_t status) {
    if (status != cudaSuccess)
        throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <typename T, bool kAligned, typename Mode>
void launch(const Sampling& task, const Options& options, cudaStream_t stream) {
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(task.num_rows));
    configuration.blockDim = dim3(kThreads);
    configuration.stream = stream;
    check(cudaLaunchKernelEx(&configuration, sample_row<T, kAligned, Mode>, task, options));
}

template <typename T, bool kAligned>
void launch(const Sampling& task, Options options, cudaStream_t stream) {
    const bool truncates = options.top_k > 0 || options.top_p < 1.0 || options.has_floor;
    if (task.temperature == 0.0)
        launch<T, kAligned, Greedy>(task, options, stream);
    else if (truncates)
        launch<T, kAligned, Truncated>(task, options, stream);
    else
        launch<T, kAligned, Plain>(task, options, stream);
}

template <typename T>
void launch(const Sampling& task, const Options& options, cudaStream_t stream) {
    const auto start = reinterpret_cast<std::uintptr_t>(task.logits);
    const auto stride = static_cast<std::uintptr_t>(task.row_stride) * sizeof(T);
    if ((start | stride) % 16 == 0)
        launch<T, true>(task, options, stream);
    else
        launch<T, false>(task, options, stream);
}

}  // namespace

void sample_tokens(const Sampling& task, int device, cudaStream_t stream) {
    if (task.vocab_size > kMaxColumns)
        throw std::invalid_argument("logits may have " + std::to_string(kMaxColumns) +
                                    " columns at most, not " + std::to_string(task.vocab_size));
    if (task.num_rows == 0) return;
    check(cudaSetDevice(device));
    const double temperature = task.temperature == 0.0 ? 1.0 : task.temperature;
    const Options options{
        static_cast<float>(temperature),
        task.top_k < task.vocab_size ? static_cast<int>(task.top_k) : 0,
        task.top_p,
        task.min_p > 0.0,
        task.min_p > 0.0 ? static_cast<float>(temperature * std::log(task.min_p)) : 0.0f,
    };
    switch (task.dtype) {
        case Dtype::kFloat32: return launch<float>(task, options, stream);
        case Dtype::kBFloat16: return launch<BFloat16>(task, options, stream);
        case Dtype::kFloat16: return launch<Float16>(task, options, stream);
    }
}

}  // namespace fuserl::cuda

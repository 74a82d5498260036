#include "token_logprobs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

// Vectors in the compilers' own extension: one source for every instruction set. Everything that
// takes or returns one is inlined, so their calling convention never matters.
#pragma GCC diagnostic ignored "-Wpsabi"
#define FUSERL_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define FUSERL_X86 1
#endif

namespace fuserl {
namespace {

constexpr std::int64_t kBlock = 1024;  // columns summed in float32 before the sum goes to double
constexpr std::int64_t kMinWork = 1 << 17;  // elements that pay for starting a thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <typename T, int kLanes>
struct Vector {
    typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};

struct Sums {
    double weights = 0.0;   // sum of e^s
    double products = 0.0;  // sum of s e^s
};

// The row arithmetic on vectors of kLanes floats, as wide as the instruction set's registers: a
// wider vector would be taken apart badly.
template <int kLanes>
struct Simd {
    static constexpr std::int64_t kWidth = kLanes;

    using Floats = typename Vector<float, kLanes>::type;
    using Words = typename Vector<std::uint32_t, kLanes>::type;
    using Halves = typename Vector<std::uint16_t, kLanes>::type;

    static FUSERL_INLINE Floats splat(float x) { return Floats{} + x; }

    static FUSERL_INLINE Floats widen(Halves halves) {
        const Words words = __builtin_convertvector(halves, Words) << 16;
        Floats x;
        std::memcpy(&x, &words, sizeof x);
        return x;
    }

    // Round to nearest, ties to even; a NaN stays one.
    static FUSERL_INLINE Halves narrow(Floats x) {
        Words words;
        std::memcpy(&words, &x, sizeof words);
        const Words rounded = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
        const Words quiet = (words >> 16) | 0x40u;
        return __builtin_convertvector(Words(x == x ? rounded : quiet), Halves);
    }

    static FUSERL_INLINE Floats load(const float* source) {
        Floats x;
        std::memcpy(&x, source, sizeof x);
        return x;
    }

    static FUSERL_INLINE Floats load(const std::uint16_t* source) {
        Halves halves;
        std::memcpy(&halves, source, sizeof halves);
        return widen(halves);
    }

    static FUSERL_INLINE void store(float* target, Floats x) { std::memcpy(target, &x, sizeof x); }

    static FUSERL_INLINE void store(std::uint16_t* target, Floats x) {
        const Halves halves = narrow(x);
        std::memcpy(target, &halves, sizeof halves);
    }

    // The last columns, fewer than kLanes; absent lanes hold -inf, which adds nothing to any sum.
    template <typename T>
    static FUSERL_INLINE Floats load_tail(const T* source, std::int64_t count) {
        T lanes[kLanes];
        const Floats filler = splat(-kInfinity);
        store(lanes, filler);
        std::memcpy(lanes, source, sizeof(T) * count);
        return load(lanes);
    }

    template <typename T>
    static FUSERL_INLINE void store_tail(T* target, Floats x, std::int64_t count) {
        T lanes[kLanes];
        store(lanes, x);
        std::memcpy(target, lanes, sizeof(T) * count);
    }

    template <typename T>
    static FUSERL_INLINE float load_one(const T* source) {
        return load_tail(source, 1)[0];
    }

    template <typename T>
    static FUSERL_INLINE void store_one(T* target, float x) {
        store_tail(target, splat(x), 1);
    }

    // e^x for x <= about 1: x = n ln 2 + r with |r| <= ln 2 / 2, Taylor to r^7 (relative error 5e-9
    // before rounding). Below -87.3, where the result would be subnormal, 0; NaN stays NaN.
    static FUSERL_INLINE Floats exponential(Floats x) {
        const Floats shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
        const Floats shifted = x * 1.44269504f + shifter;
        const Floats n = shifted - shifter;
        Floats r = x - n * 0.693359375f;
        r = r + n * 2.12194440e-4f;
        Floats p = splat(1.0f / 5040.0f);
        p = p * r + 1.0f / 720.0f;
        p = p * r + 1.0f / 120.0f;
        p = p * r + 1.0f / 24.0f;
        p = p * r + 1.0f / 6.0f;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        Words bits, exponent;
        std::memcpy(&bits, &p, sizeof bits);
        std::memcpy(&exponent, &shifted, sizeof exponent);
        bits += exponent << 23;
        Floats result;
        std::memcpy(&result, &bits, sizeof result);
        result = x < -87.3f ? Floats{} : result;
        return x == x ? result : x;
    }

    static FUSERL_INLINE double lane_sum(Floats x) {
        double sum = 0.0;
        for (int lane = 0; lane < kLanes; ++lane) sum += x[lane];
        return sum;
    }

    template <typename T>
    static FUSERL_INLINE float row_maximum(const T* row, std::int64_t size) {
        Floats maxima[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity),
                            splat(-kInfinity)};
        std::int64_t column = 0;
        for (; column + 4 * kLanes <= size; column += 4 * kLanes)
            for (int part = 0; part < 4; ++part) {
                const Floats x = load(row + column + part * kLanes);
                maxima[part] = x > maxima[part] ? x : maxima[part];
            }
        for (; column < size; column += kLanes) {
            const std::int64_t left = size - column;
            const Floats x = left >= kLanes ? load(row + column) : load_tail(row + column, left);
            maxima[0] = x > maxima[0] ? x : maxima[0];
        }
        float maximum = -kInfinity;
        for (const Floats& part : maxima)
            for (int lane = 0; lane < kLanes; ++lane) maximum = std::max(maximum, part[lane]);
        return maximum;
    }

    // s = (x - maximum) / temperature over the row; a NaN anywhere makes the sums NaN.
    template <typename T, bool kEntropy>
    static FUSERL_INLINE Sums row_sums(const T* row, std::int64_t size, float maximum,
                                       float inverse) {
        Sums sums;
        for (std::int64_t start = 0; start < size; start += kBlock) {
            const std::int64_t stop = std::min(start + kBlock, size);
            Floats weights[2] = {Floats{}, Floats{}};
            Floats products[2] = {Floats{}, Floats{}};
            for (std::int64_t column = start; column < stop; column += 2 * kLanes)
                for (int part = 0; part < 2; ++part) {
                    const T* source = row + column + part * kLanes;
                    const std::int64_t left = row + stop - source;
                    if (left <= 0) break;
                    const Floats x = left >= kLanes ? load(source) : load_tail(source, left);
                    const Floats s = (x - maximum) * inverse;
                    const Floats e = exponential(s);
                    weights[part] += e;
                    if (kEntropy) products[part] += e == 0.0f ? e : s * e;
                }
            sums.weights += lane_sum(weights[0] + weights[1]);
            if (kEntropy) sums.products += lane_sum(products[0] + products[1]);
        }
        return sums;
    }
};

struct Forward {
    const Rows& rows;
    float* logprobs;
    float* entropy;
    float* stats;

    template <typename S, typename T>
    FUSERL_INLINE void run(std::int64_t first, std::int64_t last) const {
        for (std::int64_t index = first; index < last; ++index) {
            float logprob = 0.0f, row_entropy = 0.0f, maximum = 0.0f;
            double log_sum = 0.0;
            if (rows.loss_mask == nullptr || rows.loss_mask[index]) {
                const T* row = static_cast<const T*>(rows.logits) + index * rows.row_stride;
                const double temperature =
                    rows.temperatures ? rows.temperatures[index] : rows.temperature;
                const float inverse = static_cast<float>(1.0 / temperature);
                maximum = S::row_maximum(row, rows.vocab_size);
                const Sums sums =
                    entropy
                        ? S::template row_sums<T, true>(row, rows.vocab_size, maximum, inverse)
                        : S::template row_sums<T, false>(row, rows.vocab_size, maximum, inverse);
                log_sum = std::log(sums.weights);
                row_entropy = static_cast<float>(log_sum - sums.products / sums.weights);
                const std::int64_t token = rows.token_ids[index];
                logprob = kNaN;
                if (token >= 0 && token < rows.vocab_size) {
                    const double x = S::load_one(row + token);
                    logprob = static_cast<float>((x - maximum) / temperature - log_sum);
                }
            }
            logprobs[index] = logprob;
            if (entropy) entropy[index] = row_entropy;
            stats[index] = maximum;
            stats[rows.num_rows + index] = static_cast<float>(log_sum);
        }
    }
};

struct Backward {
    const Rows& rows;
    const float* stats;
    const float* entropy;
    const float* grad_logprobs;
    const float* grad_entropy;
    void* out;
    std::int64_t out_stride;

    // -(g p + h p (logp + entropy)) / temperature, from logp
    template <typename S>
    static FUSERL_INLINE typename S::Floats gradient(typename S::Floats logp, float g, float h,
                                                     float row_entropy) {
        const typename S::Floats p = S::exponential(logp);
        const typename S::Floats slope = -p * (g + h * (logp + row_entropy));
        return p == 0.0f ? typename S::Floats{} : slope;
    }

    template <typename S, typename T>
    FUSERL_INLINE void run(std::int64_t first, std::int64_t last) const {
        const std::int64_t size = rows.vocab_size;
        for (std::int64_t index = first; index < last; ++index) {
            T* target = static_cast<T*>(out) + index * out_stride;
            if (rows.loss_mask && !rows.loss_mask[index]) {
                std::memset(target, 0, sizeof(T) * size);
                continue;
            }
            const T* row = static_cast<const T*>(rows.logits) + index * rows.row_stride;
            const double temperature =
                rows.temperatures ? rows.temperatures[index] : rows.temperature;
            const float inverse = static_cast<float>(1.0 / temperature);
            const float maximum = stats[index], log_sum = stats[rows.num_rows + index];
            const float h = grad_entropy ? grad_entropy[index] : 0.0f;
            const float row_entropy = grad_entropy ? entropy[index] : 0.0f;
            const std::int64_t token = rows.token_ids[index];
            const bool inside = token >= 0 && token < size;
            const float g = inside ? grad_logprobs[index] : kNaN;

            // The token's own entry, read before the row may be overwritten. Its 1 - p comes from
            // expm1, which keeps its digits when p is close to 1.
            float at_token = kNaN;
            if (inside) {
                const double x = S::load_one(row + token);
                const double logp = (x - maximum) / temperature - log_sum;
                const double p = std::exp(logp);
                const double slope = p == 0.0 ? 0.0 : h * p * (logp + row_entropy);
                at_token = static_cast<float>((g * -std::expm1(logp) - slope) / temperature);
            }
            for (std::int64_t column = 0; column < size; column += S::kWidth) {
                const std::int64_t left = size - column;
                const bool whole = left >= S::kWidth;
                const auto x = whole ? S::load(row + column) : S::load_tail(row + column, left);
                const auto logp = (x - maximum) * inverse - log_sum;
                const auto slope = gradient<S>(logp, g, h, row_entropy) * inverse;
                if (whole)
                    S::store(target + column, slope);
                else
                    S::store_tail(target + column, slope, left);
            }
            if (inside) S::store_one(target + token, at_token);
        }
    }
};

// One copy of the row loops per instruction set; the inlined code takes on the set of its caller.
template <int kLanes, typename Task>
FUSERL_INLINE void run_rows(const Task& task, std::int64_t first, std::int64_t last) {
    if (task.rows.is_bf16)
        task.template run<Simd<kLanes>, std::uint16_t>(first, last);
    else
        task.template run<Simd<kLanes>, float>(first, last);
}

#ifdef FUSERL_X86
template <typename Task>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))) void run_avx512(
    const Task& task, std::int64_t first, std::int64_t last) {
    run_rows<16>(task, first, last);
}

template <typename Task>
__attribute__((target("avx2,fma"))) void run_avx2(const Task& task, std::int64_t first,
                                                  std::int64_t last) {
    run_rows<8>(task, first, last);
}
#endif

template <typename Task>
void run_baseline(const Task& task, std::int64_t first, std::int64_t last) {
    run_rows<4>(task, first, last);
}

enum class Level { kBaseline, kAvx2, kAvx512 };

Level level() {
#ifdef FUSERL_X86
    static const Level best = [] {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            return Level::kAvx512;
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Level::kAvx2;
        return Level::kBaseline;
    }();
    return best;
#else
    return Level::kBaseline;
#endif
}

// Rows are dealt out in equal runs; each is computed alone, so the split changes no result.
template <typename Task>
void run_parallel(const Task& task, int num_threads) {
    void (*run)(const Task&, std::int64_t, std::int64_t) = run_baseline<Task>;
#ifdef FUSERL_X86
    if (level() == Level::kAvx512) run = run_avx512<Task>;
    if (level() == Level::kAvx2) run = run_avx2<Task>;
#endif
    const std::int64_t num_rows = task.rows.num_rows;
    const std::int64_t worth = num_rows * task.rows.vocab_size / kMinWork;
    const std::int64_t count =
        std::max<std::int64_t>(1, std::min<std::int64_t>({num_threads, num_rows, worth}));
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(count));
    for (std::int64_t part = 1; part < count; ++part) {
        const std::int64_t first = num_rows * part / count, last = num_rows * (part + 1) / count;
        try {
            helpers.emplace_back(run, std::cref(task), first, last);
        } catch (const std::system_error&) {  // no thread to be had: do its share here
            run(task, first, last);
        }
    }
    run(task, 0, num_rows / count);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void token_logprobs_forward(const Rows& rows, float* logprobs, float* entropy, float* stats,
                            int num_threads) {
    run_parallel(Forward{rows, logprobs, entropy, stats}, num_threads);
}

void token_logprobs_backward(const Rows& rows, const float* stats, const float* entropy,
                             const float* grad_logprobs, const float* grad_entropy, void* out,
                             std::int64_t out_stride, int num_threads) {
    run_parallel(Backward{rows, stats, entropy, grad_logprobs, grad_entropy, out, out_stride},
                 num_threads);
}

const char* instruction_set() {
    switch (level()) {
        case Level::kAvx512: return "avx512";
        case Level::kAvx2: return "avx2";
        default: return "baseline";
    }
}

}  // namespace fuserl

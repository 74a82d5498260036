// One sampled token a row on the CPU, with its log-probability before and after truncation.
//
// Logits [num_rows, vocab_size] with any row stride and unit column stride. A row's result depends
// on the row, its numbers and the instruction set only. Definition:
// kernels/fuserl_kernels/reference/sampling.py.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "philox.h"

namespace fuserl {

struct Sampling {
    const void* logits;
    Dtype dtype;
    std::int64_t num_rows;
    std::int64_t vocab_size;  // below 2^32
    std::int64_t row_stride;  // in elements
    double temperature;       // 0 for the largest logit
    std::int64_t top_k;       // 0 for all
    double top_p;             // 1 for all
    double min_p;             // 0 for all
    std::uint64_t seed;
    const std::int64_t* request_ids;  // [num_rows]
    const std::int64_t* positions;    // [num_rows]
    std::int64_t* token_ids;          // [num_rows]; -1 for a row that is no distribution
    float* logprobs;                  // [num_rows]; NaN for such a row
    float* truncated_logprobs;        // [num_rows]; NaN for such a row

    bool greedy() const { return temperature == 0.0; }
    bool limits_count() const { return top_k > 0 && top_k < vocab_size; }
    bool limits_mass() const { return top_p < 1.0; }
    bool truncates() const {
        return !greedy() && (limits_count() || limits_mass() || min_p > 0.0);
    }
};

// Throws std::invalid_argument for a vocabulary of 2^32 or more.
void sample_tokens(const Sampling& task, int num_threads);

// Logits [num_rows, vocab_size], contiguous, become softcap * tanh(logits / softcap), to the bits of
// token_logprobs' own.
void cap_logits(float* logits, std::int64_t num_rows, std::int64_t vocab_size, float softcap,
                int num_threads);

constexpr std::int64_t kSamplingLanes = 2048;  // lanes of the CDF: LANES of the definition
constexpr std::int64_t kBins = 2048;           // of a histogram
constexpr int kCopies = 2;                     // of a histogram, which entries take in turn

// The mass of the entries in each bin, and where it is asked for their number; the last bin is for
// those without mass. Two copies, as adding to a bin waits for what was added to it just before.
struct Histogram {
    double masses[kCopies][kBins + 1];
    std::uint32_t counts[kCopies][kBins + 1];

    double mass(std::int64_t bin) const { return masses[0][bin] + masses[1][bin]; }
    std::int64_t count(std::int64_t bin) const { return counts[0][bin] + counts[1][bin]; }
};

// What a thread needs for a row, kept from call to call.
struct SamplingScratch {
    alignas(64) float lanes[kSamplingLanes];  // the mass of each lane, in load_pair's order
    alignas(64) float weights[kSamplingLanes];
    std::uint16_t list_bins[kSamplingLanes];
    Histogram of_row, of_list;
    // For a truncated row, with room for its columns; values also for the columns of a lane.
    std::uint16_t* bins;  // and for whole blocks of kSamplingLanes
    float* values;
    std::uint32_t* columns;
};

// What instruction sets have versions of: each does the rows [first, last).
struct SamplingFunctions {
    void (*sample)(const Sampling& task, std::int64_t first, std::int64_t last,
                   SamplingScratch& scratch);
    // Of x [count]: see cap_logits.
    void (*cap)(float* x, std::int64_t count, float softcap);
};

}  // namespace fuserl

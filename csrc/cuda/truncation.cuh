// The kept set of a row: a prefix of the order (value descending, column ascending), so it ends
// with one entry, found exactly.
//
// Every entry has a code, an integer: the value's bits made to order like the values, then the
// column counted from the end. Larger codes come first, and no two are equal. A histogram in shared
// memory, at first over the distance to the maximum, tells in which bin the prefix ends; the
// entries of that bin are listed, sorted and summed. A bin too full for the list (ties, clusters,
// the last bin) is binned again by its codes, 2048 to 1, until it fits. So most rows are read
// twice: for the histogram, and for the list, when what lies above it is summed for the draw too.
//
// Masses are integers in units of 2^-40 of the heaviest entry's, so threads may add them in any
// order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "row_statistics.cuh"

namespace fuserl::cuda {

using Code = unsigned long long;

constexpr float kFixedOne = 0x1p40f;
constexpr int kColumnBits = 22;  // and 2^22 of the heaviest entries fit into a Mass
constexpr int kMaxColumns = 1 << kColumnBits;
constexpr Code kColumnMask = kMaxColumns - 1;
constexpr int kLastBin = kSlots - 1;  // for what lies farther from the maximum than 20 halvings
constexpr float kBinsPerHalving = kLastBin / 20.0f;

__device__ inline Mass fixed(float mass) { return static_cast<Mass>(mass * kFixedOne); }

// Integers in the order of the values, equal where those are: -0 counts as 0.
__device__ inline unsigned key_of(float x) {
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float value_of(unsigned key) {
    return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key);
}

__device__ inline Code code_of(float x, int column) {
    return (Code{key_of(x)} << kColumnBits) | (kColumnMask - static_cast<Code>(column));
}

__device__ inline float value_of(Code code) {
    return value_of(static_cast<unsigned>(code >> kColumnBits));
}

__device__ inline int column_of(Code code) {
    return static_cast<int>(kColumnMask - (code & kColumnMask));
}

// The smallest key whose value, at most `largest`, meets a condition that all greater values meet.
template <typename Condition>
__device__ unsigned first_key(float largest, Condition meets) {
    unsigned low = key_of(-INFINITY), high = key_of(largest);
    while (low < high) {
        const unsigned middle = low + (high - low) / 2;
        if (meets(value_of(middle)))
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

// The entries above `value`, and those equal to it up to a column.
struct Kept {
    float value;
    int last;

    __device__ bool has(float x, int column) const {
        return x > value || (x == value && column <= last);
    }
};

// Counts and masses of a block's 2048 bins, or of the lanes.
struct Histogram {
    unsigned counts[kSlots];
    unsigned low[kSlots], high[kSlots];  // of the masses: shared memory adds 32 bits at a time

    __device__ void clear() {
        __syncthreads();
        for (int slot = threadIdx.x; slot < kSlots; slot += kThreads)
            counts[slot] = low[slot] = high[slot] = 0;
        __syncthreads();
    }

    __device__ void add_mass(int slot, Mass mass) {
        const auto bits = static_cast<Code>(mass);
        const auto addend = static_cast<unsigned>(bits);
        const unsigned carry = atomicAdd(&low[slot], addend) > ~addend ? 1 : 0;
        const unsigned rest = static_cast<unsigned>(bits >> 32) + carry;
        if (rest != 0) atomicAdd(&high[slot], rest);
    }

    __device__ Mass mass(int slot) const {
        return static_cast<Mass>((Code{high[slot]} << 32) | low[slot]);
    }
};

struct TruncationStorage {
    Histogram histogram;
    Code list[kSlots];
    int num_listed;
};

// Where a prefix ends: with the entry that makes its count, or its mass, this large.
struct Goal {
    bool of_mass;
    Mass amount;
};

template <typename Row>
class Truncation {
   public:
    __device__ Truncation(const Row& row, float row_max, float scale, bool counts, bool masses,
                          TruncationStorage& storage)
        : row_(row), row_max_(row_max), scale_(scale), counts_(counts), masses_(masses),
          storage_(storage) {}

    // Bins the row, unless the bins are still its own: before find() and total_mass().
    __device__ void bin() {
        if (!bins_are_of_row_) bin_row();
    }

    // Of the row.
    __device__ Mass total_mass() {
        Mass bins[kShare];
        masses_of_bins(bins);
        return Cumulative(bins).total();
    }

    // Where the prefix ends. Leaves its end in the list, and its mass in mass().
    __device__ Kept find(const Goal& goal) {
        mass_ = 0;
        const Crossing first = cross(goal, 0);
        Mass before = first.before;
        Window window = window_of_bin(first.bin);
        while (!list(window)) {
            const int shift = bin_window(window);
            const Crossing next = cross(goal, before);
            before = next.before;
            window.high -= static_cast<Code>(next.bin) << shift;
            const Code width = Code{1} << shift;
            if (window.high - window.low >= width) window.low = window.high - width + 1;
        }
        sort_list();
        const Code last = storage_.list[end_of_list(goal, before)];
        return {value_of(last), column_of(last)};
    }

    // Of the prefix that find() found last.
    __device__ Mass mass() const { return mass_; }

    // Of each lane of the thread, within that prefix.
    __device__ void lane_masses(Mass (&out)[kShare]) {
        Histogram& lanes = storage_.histogram;
        lanes.clear();
        bins_are_of_row_ = false;
        for (int i = threadIdx.x; i < num_kept_; i += kThreads) {
            const Code code = storage_.list[i];
            lanes.add_mass(column_of(code) % kLanes, mass_of(value_of(code)));
        }
        __syncthreads();
#pragma unroll
        for (int lane = 0; lane < kShare; ++lane)
            out[lane] = fixed(above_[lane]) + lanes.mass(first_slot() + lane);
    }

   private:
    struct Window {
        Code low, high;  // both inside
    };

    struct Crossing {
        int bin;
        Mass before;  // count or mass of what comes before the bin
    };

    __device__ Mass mass_of(float x) const { return fixed(weight(x, row_max_, scale_)); }

    // Falls with x, strictly or not.
    __device__ int bin_of(float x) const {
        const float halvings = (row_max_ - x) * scale_;
        return static_cast<int>(fminf(halvings * kBinsPerHalving, static_cast<float>(kLastBin)));
    }

    __device__ void add(int bin, float x) {
        if (counts_) atomicAdd(&storage_.histogram.counts[bin], 1u);
        if (masses_) {
            const Mass mass = mass_of(x);
            if (mass != 0) storage_.histogram.add_mass(bin, mass);
        }
    }

    // Most of a row may belong to the last bin, where threads would queue: they add up its mass on
    // their own, and nobody needs its count.
    __device__ void bin_row() {
        storage_.histogram.clear();
        Mass rest = 0;
        row_.template each<Walk::kUp>([&](float x, Where) {
            const int bin = bin_of(x);
            if (bin < kLastBin)
                add(bin, x);
            else if (masses_)
                rest += mass_of(x);
        });
        rest = sum(rest);
        if (threadIdx.x == 0) storage_.histogram.add_mass(kLastBin, rest);
        __syncthreads();
        bins_are_of_row_ = true;
    }

    // Bins of 2^shift codes each, from the largest code down. Returns the shift.
    __device__ int bin_window(const Window& window) {
        int shift = 0;
        while ((window.high - window.low) >> shift >= kSlots) ++shift;
        storage_.histogram.clear();
        bins_are_of_row_ = false;
        each_within<Walk::kUp>(window, [&](float x, Code code) {
            add(static_cast<int>((window.high - code) >> shift), x);
        }, [](float, int) {});
        __syncthreads();
        return shift;
    }

    // within(x, code) for the entries of the window, above(x, lane) for those before it.
    template <Walk kWalk, typename Within, typename Above>
    __device__ void each_within(const Window& window, Within within, Above above) {
        const float low = value_of(window.low), high = value_of(window.high);
        row_.template each<kWalk>([&](float x, Where where) {
            if (x > high) {
                above(x, where.lane);
            } else if (x >= low) {
                const Code code = code_of(x, where.column);
                if (code > window.high)
                    above(x, where.lane);
                else if (code >= window.low)
                    within(x, code);
            }
        });
    }

    __device__ void masses_of_bins(Mass (&out)[kShare]) const {
#pragma unroll
        for (int i = 0; i < kShare; ++i) out[i] = storage_.histogram.mass(first_slot() + i);
    }

    // The bin in which the goal is reached, of which `before` lies above the histogram.
    __device__ Crossing cross(const Goal& goal, Mass before) {
        Mass bins[kShare];
        if (goal.of_mass) {
            masses_of_bins(bins);
        } else {
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                const int bin = first_slot() + i;
                const bool is_rest = bins_are_of_row_ && bin == kLastBin;
                bins[i] = is_rest ? row_.size() : storage_.histogram.counts[bin];
            }
        }
        const auto place = Cumulative(bins).past(goal.amount - before - 1);
        if (masses_) {
            masses_of_bins(bins);
            mass_ += sum_before(bins, place.slot);
        }
        return {place.slot, before + place.before};
    }

    // Of the slots before one.
    __device__ static Mass sum_before(const Mass (&slots)[kShare], int end) {
        Mass mine = 0;
#pragma unroll
        for (int i = 0; i < kShare; ++i)
            if (first_slot() + i < end) mine += slots[i];
        return sum(mine);
    }

    __device__ Window window_of_bin(int bin) const {
        const unsigned low = first_key(row_max_, [&](float x) { return bin_of(x) <= bin; });
        const unsigned high = bin == 0 ? key_of(row_max_)
            : first_key(row_max_, [&](float x) { return bin_of(x) < bin; }) - 1;
        return {Code{low} << kColumnBits, (Code{high} << kColumnBits) | kColumnMask};
    }

    // List the entries of the window, and sum those above it in each lane. False if too many.
    __device__ bool list(const Window& window) {
        __syncthreads();
        if (threadIdx.x == 0) storage_.num_listed = 0;
        __syncthreads();
#pragma unroll
        for (int lane = 0; lane < kShare; ++lane) above_[lane] = 0.0f;
        each_within<Walk::kDown>(window, [&](float, Code code) {
            const int place = atomicAdd(&storage_.num_listed, 1);
            if (place < kSlots) storage_.list[place] = code;
        }, [&](float x, int lane) { above_[lane] += weight(x, row_max_, scale_); });
        __syncthreads();
        return storage_.num_listed <= kSlots;
    }

    // The largest code first: a bitonic sort over a power of two, filled up with codes of nothing.
    __device__ void sort_list() {
        int size = 2;
        while (size < storage_.num_listed) size *= 2;
        for (int i = storage_.num_listed + threadIdx.x; i < size; i += kThreads)
            storage_.list[i] = 0;
        for (int run = 2; run <= size; run *= 2)
            for (int step = run / 2; step > 0; step /= 2) {
                __syncthreads();
                for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
                    const int i = pair / step * step * 2 + pair % step;
                    Code& first = storage_.list[i];
                    Code& second = storage_.list[i + step];
                    const bool falls = (i & run) == 0;
                    if ((first < second) == falls) {
                        const Code other = first;
                        first = second;
                        second = other;
                    }
                }
            }
        __syncthreads();
    }

    // The place in the sorted list where the goal is reached, of which `before` lies above it.
    __device__ int end_of_list(const Goal& goal, Mass before) {
        Mass amounts[kShare], masses[kShare];
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            const int place = first_slot() + i;
            const bool listed = place < storage_.num_listed;
            masses[i] = listed && masses_ ? mass_of(value_of(storage_.list[place])) : 0;
            amounts[i] = goal.of_mass ? masses[i] : static_cast<Mass>(listed);
        }
        const int end = Cumulative(amounts).past(goal.amount - before - 1).slot;
        num_kept_ = end + 1;
        if (masses_) mass_ += sum_before(masses, num_kept_);
        return end;
    }

    const Row& row_;
    const float row_max_, scale_;
    const bool counts_, masses_;
    TruncationStorage& storage_;
    bool bins_are_of_row_ = false;
    int num_kept_ = 0;       // of the list
    Mass mass_ = 0;
    float above_[kShare];    // the mass of each lane above the list
};

}  // namespace fuserl::cuda

// What the 256 threads of a block do together: reductions in a fixed order, and prefix sums over
// 2048 slots, of which a thread has eight neighbours.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fuserl::cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kShare = 8;  // slots of a thread
constexpr int kSlots = kThreads * kShare;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

using Mass = long long;  // fixed point, so sums are exact and their order changes nothing

__device__ inline int first_slot() { return static_cast<int>(threadIdx.x) * kShare; }

// In pairs of neighbours, and pairs of pairs; every thread gets the result.
template <typename T, typename Combine>
__device__ T reduce(T value, Combine combine) {
    __shared__ T parts[kWarps];
    for (int step = 1; step < kWarpSize; step *= 2)
        value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
    __syncthreads();  // the parts of an earlier call have been read
    if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    T halves[2];
    for (int half = 0; half < 2; ++half) {
        const T* four = parts + 4 * half;
        halves[half] = combine(combine(four[0], four[1]), combine(four[2], four[3]));
    }
    return combine(halves[0], halves[1]);
}
static_assert(kWarps == 8, "reduce combines eight warps");

__device__ inline float maximum(float value) {
    return reduce(value, [](float a, float b) { return fmaxf(a, b); });
}

__device__ inline Mass sum(Mass value) {
    return reduce(value, [](Mass a, Mass b) { return a + b; });
}

// Eight neighbouring slots of each thread, none negative, summed from the first slot on.
class Cumulative {
   public:
    __device__ explicit Cumulative(const Mass (&own)[kShare]) : own_(own) {
        __shared__ Mass warps[kWarps];
        Mass mine = 0;
        for (const Mass value : own) mine += value;
        Mass through = mine;
        const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
        for (int step = 1; step < kWarpSize; step *= 2) {
            const Mass earlier = __shfl_up_sync(kAllLanes, through, step);
            if (lane >= step) through += earlier;
        }
        __syncthreads();
        if (lane == kWarpSize - 1) warps[threadIdx.x / kWarpSize] = through;
        __syncthreads();
        before_ = through - mine;
        total_ = 0;
        for (int warp = 0; warp < kWarps; ++warp) {
            if (warp < static_cast<int>(threadIdx.x) / kWarpSize) before_ += warps[warp];
            total_ += warps[warp];
        }
    }

    __device__ Mass total() const { return total_; }

    struct Place {
        int slot;
        Mass before, own;
    };

    // The slot with which the sum exceeds the target, 0 <= target < total().
    __device__ Place past(Mass target) const {
        __shared__ Place place;
        Mass before = before_;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            if (before <= target && target < before + own_[i])
                place = {first_slot() + i, before, own_[i]};
            before += own_[i];
        }
        __syncthreads();
        return place;
    }

   private:
    const Mass (&own_)[kShare];
    Mass before_, total_;
};

}  // namespace fuserl::cuda

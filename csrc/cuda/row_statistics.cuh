// Maximum and sum of exponentials of a row, with the bits of the Triton kernels: the formulas and
// their order are those of _lane_statistics and _merge_lanes in triton_helpers.py, which walk the
// row from its end. Nothing may be contracted to a fused multiply-add (nvcc -fmad=false).
#pragma once

#include <cuda_runtime.h>

#include <cuda/instructions.cuh>

#include "row.cuh"

namespace fuserl::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinExponent = -1000.0f;  // 2^-1000 is 0 in float32, and 0 * -1000 a zero

// The factor that makes sums relative to `from` relative to `to` >= from.
__device__ inline float rebase(float from, float to, float scale) {
    const float floor = to == -INFINITY ? 0.0f : to;
    const float start = from == -INFINITY ? floor : from;
    return exp2_approximate(fmaxf((start - floor) * scale, kMinExponent));
}

__device__ inline float weight(float x, float maximum, float scale) {
    return exp2_approximate((x - maximum) * scale);
}

// Of the thread's eight lanes.
class LaneStatistics {
   public:
    // kLargest: note also where each lane has its maximum first.
    template <bool kLargest, typename Row>
    __device__ void read(const Row& row, float scale) {
#pragma unroll
        for (int lane = 0; lane < kShare; ++lane) {
            maximum_[lane] = -INFINITY;
            sum_[lane] = 0.0f;
            turn_[lane] = 0;
        }
        for (int turn = row.turns() - 1; turn >= row.fours() * kFour; --turn) {
            float x[kShare];
            row.load_turn(turn, x);
#pragma unroll
            for (int lane = 0; lane < kShare; ++lane) {
                if (kLargest && x[lane] >= maximum_[lane]) turn_[lane] = turn;
                const float terms = grow(lane, fmaxf(maximum_[lane], x[lane]), scale);
                sum_[lane] = terms + term(x[lane], lane, scale);
            }
        }
        for (int i = row.fours() - 1; i >= 0; --i) {
            float x[kFour][kShare];
            row.load_four(i, x);
#pragma unroll
            for (int lane = 0; lane < kShare; ++lane) {
                const float x0 = x[0][lane], x1 = x[1][lane], x2 = x[2][lane], x3 = x[3][lane];
                if (kLargest) find_largest(lane, i * kFour, x0, x1, x2, x3);
                const float largest = fmaxf(fmaxf(x0, x1), fmaxf(fmaxf(x2, x3), maximum_[lane]));
                const float terms = grow(lane, largest, scale);
                sum_[lane] = terms + ((term(x0, lane, scale) + term(x1, lane, scale)) +
                                      (term(x2, lane, scale) + term(x3, lane, scale)));
            }
        }
    }

    __device__ float row_maximum() const {
        float largest = maximum_[0];
#pragma unroll
        for (int lane = 1; lane < kShare; ++lane) largest = fmaxf(largest, maximum_[lane]);
        return maximum(largest);
    }

    // The sum of each lane, relative to the row's maximum.
    __device__ void sums(float row_max, float scale, float (&out)[kShare]) const {
#pragma unroll
        for (int lane = 0; lane < kShare; ++lane)
            out[lane] = rebase(maximum_[lane], row_max, scale) * sum_[lane];
    }

    // The first column of the row's maximum; read<true> only.
    __device__ int largest(float row_max) const {
        int column = INT32_MAX;
#pragma unroll
        for (int lane = 0; lane < kShare; ++lane)
            if (maximum_[lane] == row_max)
                column = min(column, turn_[lane] * kLanes + first_slot() + lane);
        return reduce(column, [](int a, int b) { return min(a, b); });
    }

   private:
    // The lane's sum after its maximum has grown.
    __device__ float grow(int lane, float largest, float scale) {
        const float sum = rebase(maximum_[lane], largest, scale) * sum_[lane];
        maximum_[lane] = largest;
        return sum;
    }

    __device__ float term(float x, int lane, float scale) const {
        return weight(x, maximum_[lane] == -INFINITY ? 0.0f : maximum_[lane], scale);
    }

    // Downwards, so that of equal ones the first stays.
    __device__ void find_largest(int lane, int turn, float x0, float x1, float x2, float x3) {
        float largest = maximum_[lane];
        const float x[kFour] = {x0, x1, x2, x3};
#pragma unroll
        for (int i = kFour - 1; i >= 0; --i)
            if (x[i] >= largest) {
                largest = x[i];
                turn_[lane] = turn + i;
            }
    }

    float maximum_[kShare], sum_[kShare];
    int turn_[kShare];
};

// Of all lanes, in pairs and pairs of pairs.
__device__ inline float sum_lanes(const float (&x)[kShare]) {
    static_assert(kShare == 8, "three doublings");
    const float own = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    return reduce(own, [](float a, float b) { return a + b; });
}

}  // namespace fuserl::cuda

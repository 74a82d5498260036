// A row of logits in global memory, walked by a block in turns of 2048 columns, of which a thread
// has eight neighbours. So each thread has eight lanes (column modulo 2048).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include <cuda/instructions.cuh>

#include "block.cuh"

namespace fuserl::cuda {

constexpr int kLanes = kSlots;  // LANES of reference/sampling.py and of the Triton kernels
constexpr int kFour = 4;        // turns loaded at once

enum class Walk { kUp, kDown };

struct BFloat16 {
    unsigned short bits;
};

struct Float16 {
    unsigned short bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
__device__ inline float widen(Float16 x) { return float_of_half(x.bits); }

// Which lane of a thread holds x, and its column.
struct Where {
    int lane;
    int column;
};

// kAligned: the row begins at a multiple of 16 bytes. Otherwise the 16-byte pieces that cover a
// thread's columns are loaded, one more than it has, and shifted; each holds a byte of the row.
template <typename T, bool kAligned>
class Row {
   public:
    __device__ Row(const T* logits, int size) : logits_(logits), size_(size) {}

    __device__ int size() const { return size_; }
    __device__ int turns() const { return (size_ + kLanes - 1) / kLanes; }
    __device__ int fours() const { return size_ / (kFour * kLanes); }
    __device__ float at(int column) const { return widen(logits_[column]); }

    // Turns 4 i to 4 i + 3.
    __device__ void load_four(int i, float (&x)[kFour][kShare]) const {
        unsigned words[kFour][kPieces * 4];
        const char* start = begin() + i * (kFour * kTurnBytes);
#pragma unroll
        for (int turn = 0; turn < kFour; ++turn) load(start + turn * kTurnBytes, words[turn]);
#pragma unroll
        for (int turn = 0; turn < kFour; ++turn) unpack(words[turn], x[turn]);
    }

    // One turn; -inf past the end of the row.
    __device__ void load_turn(int turn, float (&x)[kShare]) const {
        const int first = turn * kLanes + first_slot();
        if ((turn + 1) * kLanes <= size_) {
            unsigned words[kPieces * 4];
            load(begin() + turn * kTurnBytes, words);
            unpack(words, x);
        } else {
#pragma unroll
            for (int lane = 0; lane < kShare; ++lane)
                x[lane] = first + lane < size_ ? at(first + lane) : -INFINITY;
        }
    }

    // visit(x, where) for each column of the thread; from the first four turns on, or from the end
    // of the row, where the cache may hold what an upward walk has read last.
    template <Walk kWalk, typename Visit>
    __device__ void each(Visit visit) const {
        if (kWalk == Walk::kDown) visit_rest(visit);
        for (int n = 0; n < fours(); ++n) {
            const int i = kWalk == Walk::kDown ? fours() - 1 - n : n;
            float x[kFour][kShare];
            load_four(i, x);
#pragma unroll
            for (int turn = 0; turn < kFour; ++turn)
                visit_turn(i * kFour + turn, x[turn], visit, kLanes);
        }
        if (kWalk == Walk::kUp) visit_rest(visit);
    }

   private:
    static constexpr int kThreadBytes = kShare * sizeof(T);
    static constexpr int kTurnBytes = kLanes * sizeof(T);
    static constexpr int kPieces = kThreadBytes / 16 + (kAligned ? 0 : 1);

    __device__ const char* begin() const {
        return reinterpret_cast<const char*>(logits_) + threadIdx.x * kThreadBytes;
    }

    __device__ unsigned skew() const {
        return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(logits_)) & 15;
    }

    __device__ void load(const char* start, unsigned (&words)[kPieces * 4]) const {
        const auto* pieces = reinterpret_cast<const uint4*>(kAligned ? start : start - skew());
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
            // With a row that is aligned after all, the last piece might lie behind its end.
            const bool spare = !kAligned && piece == kPieces - 1 && skew() == 0;
            const uint4 loaded = spare ? uint4{0, 0, 0, 0} : __ldg(pieces + piece);
            words[4 * piece] = loaded.x;
            words[4 * piece + 1] = loaded.y;
            words[4 * piece + 2] = loaded.z;
            words[4 * piece + 3] = loaded.w;
        }
    }

    template <int kCount>
    __device__ static void drop_words(unsigned (&words)[kPieces * 4]) {
#pragma unroll
        for (int i = 0; i + kCount < kPieces * 4; ++i) words[i] = words[i + kCount];
    }

    __device__ void unpack(unsigned (&words)[kPieces * 4], float (&x)[kShare]) const {
        if (!kAligned) {
            if (skew() & 8) drop_words<2>(words);
            if (skew() & 4) drop_words<1>(words);
            if (skew() & 2) {
#pragma unroll
                for (int i = 0; i + 1 < kPieces * 4; ++i)
                    words[i] = middle_of(words[i], words[i + 1]);
            }
        }
#pragma unroll
        for (int lane = 0; lane < kShare; ++lane) {
            if constexpr (sizeof(T) == 4) {
                x[lane] = __uint_as_float(words[lane]);
            } else {
                const unsigned word = words[lane / 2];
                x[lane] = widen(T{static_cast<unsigned short>(lane % 2 ? word >> 16 : word)});
            }
        }
    }

    // The turns after the last four.
    template <typename Visit>
    __device__ void visit_rest(Visit& visit) const {
        for (int turn = fours() * kFour; turn < turns(); ++turn) {
            float x[kShare];
            load_turn(turn, x);
            visit_turn(turn, x, visit, size_ - turn * kLanes);
        }
    }

    // The first `count` columns of a turn are inside the row.
    template <typename Visit>
    __device__ static void visit_turn(int turn, const float (&x)[kShare], Visit& visit, int count) {
#pragma unroll
        for (int lane = 0; lane < kShare; ++lane)
            if (first_slot() + lane < count)
                visit(x[lane], Where{lane, turn * kLanes + first_slot() + lane});
    }

    const T* logits_;
    int size_;
};

}  // namespace fuserl::cuda

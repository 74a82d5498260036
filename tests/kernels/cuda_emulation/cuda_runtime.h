// Stands in for CUDA's header of the same name, so that device code compiles as plain C++ and runs
// on the CPU: what the kernels of csrc/cuda use of it, and no more.
//
// The threads of a block are fibers of one OS thread, which switch where they wait for each other:
// a warp goes on until all of it waits for the block; blocks run one after another. So a race shows
// only as a dependence on the order of the threads: run a kernel in both orders. A barrier that
// some threads never reach ends the process.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // a block at a time, so one copy
#define __launch_bounds__(...)

struct dim3 {
    dim3(unsigned count = 1) : x(count) {}
    unsigned x;
};

struct uint4 {
    unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx;

namespace cuda_emulation {

constexpr unsigned kWarpSize = 32;
constexpr std::size_t kStackBytes = 1 << 17;

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

class Block {
   public:
    bool descending = false;  // the order in which threads run between two barriers

    void run(unsigned size, const std::function<void()>& body) {
        body_ = &body;
        size_ = num_left_ = size;
        stalled_ = 0;
        finished_.assign(size, false);
        warps_.assign(size / kWarpSize, Barrier());
        whole_ = Barrier();
        while (fibers_.size() < size) fibers_.push_back(std::make_unique<Fiber>());
        if (_setjmp(caller_) == 0) resume(descending ? size - 1 : 0);
    }

    void wait(unsigned thread, bool for_warp) {
        Barrier& barrier = for_warp ? warps_[thread / kWarpSize] : whole_;
        const unsigned generation = barrier.generation;
        stalled_ = 0;
        if (++barrier.arrived == (for_warp ? kWarpSize : size_)) {
            barrier.arrived = 0;
            ++barrier.generation;
            return;
        }
        while (barrier.generation == generation) yield(thread, for_warp);
    }

    std::uint64_t& exchanged(unsigned thread) { return exchange_[thread]; }

   private:
    struct Fiber {
        jmp_buf registers;
        bool started = false;
        std::vector<char> stack = std::vector<char>(kStackBytes);
    };

    void yield(unsigned thread, bool for_warp) {
        if (++stalled_ > 2 * size_) {
            std::fputs("a barrier that some threads of the block never reach\n", stderr);
            std::abort();
        }
        if (_setjmp(fibers_[thread]->registers) == 0) resume(next(thread, for_warp));
    }

    unsigned next(unsigned thread, bool in_warp) const {
        const unsigned size = in_warp ? kWarpSize : size_;
        const unsigned first = in_warp ? thread / size * size : 0;
        unsigned place = thread - first;
        do place = (descending ? place + size - 1 : place + 1) % size;
        while (finished_[first + place]);
        return first + place;
    }

    [[noreturn]] void resume(unsigned thread) {
        Fiber& fiber = *fibers_[thread];
        threadIdx.x = thread;
        if (fiber.started) _longjmp(fiber.registers, 1);
        fiber.started = true;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack.data();
        context.uc_stack.ss_size = kStackBytes;
        makecontext(&context, &Block::live, 0);
        setcontext(&context);
        std::abort();
    }

    // A fiber runs one thread of a block after another.
    static void live();

    const std::function<void()>* body_ = nullptr;
    unsigned size_ = 0, num_left_ = 0, stalled_ = 0;
    std::vector<bool> finished_;
    std::vector<Barrier> warps_;
    Barrier whole_;
    std::uint64_t exchange_[1024];
    std::vector<std::unique_ptr<Fiber>> fibers_;
    jmp_buf caller_;
};

inline Block block;

inline void Block::live() {
    const unsigned thread = threadIdx.x;
    while (true) {
        (*block.body_)();
        block.finished_[thread] = true;
        block.stalled_ = 0;
        if (_setjmp(block.fibers_[thread]->registers) != 0) continue;
        if (--block.num_left_ == 0) _longjmp(block.caller_, 1);
        block.resume(block.next(thread, false));
    }
}

template <typename T>
T shuffle(T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(std::uint64_t));
    const unsigned thread = threadIdx.x;
    std::memcpy(&block.exchanged(thread), &value, sizeof value);
    block.wait(thread, true);
    std::memcpy(&value, &block.exchanged(thread / kWarpSize * kWarpSize + source), sizeof value);
    block.wait(thread, true);
    return value;
}

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::block.wait(threadIdx.x, false); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return cuda_emulation::shuffle(value, threadIdx.x % 32 ^ static_cast<unsigned>(mask));
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
    const unsigned lane = threadIdx.x % 32, step = static_cast<unsigned>(distance);
    return cuda_emulation::shuffle(value, lane < step ? lane : lane - step);
}

template <typename T>
T atomicAdd(T* place, T addend) {
    const T old = *place;
    *place += addend;
    return old;
}

inline uint4 __ldg(const uint4* place) { return *place; }

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* configuration,
                               void (*kernel)(Parameters...), const Arguments&... arguments) {
    const std::function<void()> body = [&] { kernel(arguments...); };
    for (unsigned index = 0; index < configuration->gridDim.x; ++index) {
        blockIdx.x = index;
        cuda_emulation::block.run(configuration->blockDim.x, body);
    }
    return cudaSuccess;
}

#include "sampling.h"

#include <stdexcept>
#include <vector>

#include "kernel_functions.h"
#include "parallel.h"

namespace fuserl {
namespace {

// A truncated row is walked about as often as a plain one.
constexpr std::int64_t kTruncatedWork = 8;

class ThreadScratch {
   public:
    SamplingScratch& of(const Sampling& task) {
        const auto turns = static_cast<std::size_t>(task.vocab_size / kSamplingLanes + 1);
        grow(values_, turns);
        if (task.truncates()) {
            grow(bins_, turns * kSamplingLanes);
            grow(values_, turns * kSamplingLanes);
            grow(columns_, turns * kSamplingLanes);
        }
        scratch_.bins = bins_.data();
        scratch_.values = values_.data();
        scratch_.columns = columns_.data();
        return scratch_;
    }

   private:
    template <typename T>
    static void grow(std::vector<T>& room, std::size_t size) {
        if (room.size() < size) room.resize(size);
    }

    SamplingScratch scratch_;
    std::vector<std::uint16_t> bins_;
    std::vector<float> values_;
    std::vector<std::uint32_t> columns_;
};

}  // namespace

void sample_tokens(const Sampling& task, int num_threads) {
    if (task.vocab_size >= std::int64_t{1} << 32)
        throw std::invalid_argument("logits must have fewer than 2^32 columns");
    const auto sample = kernel_functions().sampling.sample;
    const std::int64_t work = task.vocab_size * (task.truncates() ? kTruncatedWork : 1);
    parallel_rows(task.num_rows, work, num_threads, [&](std::int64_t first, std::int64_t last) {
        thread_local ThreadScratch scratch;
        sample(task, first, last, scratch.of(task));
    });
}

void cap_logits(float* logits, std::int64_t num_rows, std::int64_t vocab_size, float softcap,
                int num_threads) {
    const auto cap = kernel_functions().sampling.cap;
    parallel_rows(num_rows, vocab_size, num_threads, [&](std::int64_t first, std::int64_t last) {
        cap(logits + first * vocab_size, (last - first) * vocab_size, softcap);
    });
}

}  // namespace fuserl

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace fuserl {
namespace {

constexpr std::int64_t kThreadWork = 1 << 18;  // elements that pay for starting a thread
constexpr std::int64_t kRunWork = 1 << 19;     // elements dealt out at once: a huge page of float32

}  // namespace

void parallel_rows(std::int64_t num_rows, std::int64_t row_size, int num_threads,
                   const std::function<void(std::int64_t, std::int64_t)>& run) {
    const std::int64_t worth = num_rows * row_size / kThreadWork;
    const std::int64_t count =
        std::max<std::int64_t>(1, std::min<std::int64_t>({num_threads, num_rows, worth}));
    if (count == 1) return run(0, num_rows);

    // Short runs, taken as threads come free: masked rows cost nothing, so equal shares would not
    // be equal work.
    const std::int64_t share = (num_rows + count - 1) / count;
    const std::int64_t rows = std::max<std::int64_t>(1, std::min(kRunWork / row_size, share));
    std::atomic<std::int64_t> next{0};
    const auto work = [&] {
        for (;;) {
            const std::int64_t first = next.fetch_add(rows);
            if (first >= num_rows) return;
            run(first, std::min(first + rows, num_rows));
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(count));
    for (std::int64_t part = 1; part < count; ++part) {
        try {
            helpers.emplace_back(work);
        } catch (const std::system_error&) {  // no thread to be had: the others do its work
            break;
        }
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace fuserl

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <dlfcn.h>
#endif

namespace fuserl {
namespace {

constexpr std::int64_t kThreadWork = 1 << 18;  // elements that pay for starting a thread
constexpr std::int64_t kTeamWork = 1 << 15;    // elements that pay for waking a waiting one
constexpr std::int64_t kRunWork = 1 << 19;     // elements dealt out at once: a huge page of float32

// The entry of the OpenMP runtime that the process has loaded already, torch's, or null. Its
// threads spin for milliseconds after each parallel operation: with threads of our own beside them
// a core would be shared between work and waiting. Looked up by name, because a runtime that this
// library were linked to would be a second one, with threads of its own.
using StartTeam = void (*)(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

StartTeam find_team() {
#if defined(__unix__)
    return reinterpret_cast<StartTeam>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

template <typename Work>
void run_in_team(StartTeam start, Work& work, std::int64_t count) {
    start([](void* data) { (*static_cast<Work*>(data))(); }, &work, static_cast<unsigned>(count), 0);
}

template <typename Work>
void run_in_threads(Work& work, std::int64_t count) {
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(count));
    for (std::int64_t part = 1; part < count; ++part) {
        try {
            helpers.emplace_back(std::ref(work));
        } catch (const std::system_error&) {  // no thread to be had: the others do its work
            break;
        }
    }
    work();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void parallel_rows(std::int64_t num_rows, std::int64_t row_size, int num_threads,
                   const std::function<void(std::int64_t, std::int64_t)>& run) {
    static const StartTeam start_team = find_team();
    const std::int64_t worth = num_rows * row_size / (start_team ? kTeamWork : kThreadWork);
    const std::int64_t count =
        std::max<std::int64_t>(1, std::min<std::int64_t>({num_threads, num_rows, worth}));
    if (count == 1) return run(0, num_rows);

    // Short runs, taken as threads come free: masked rows cost nothing, so equal shares would not
    // be equal work.
    const std::int64_t share = (num_rows + count - 1) / count;
    const std::int64_t rows = std::max<std::int64_t>(1, std::min(kRunWork / row_size, share));
    std::atomic<std::int64_t> next{0};
    auto work = [&] {
        for (;;) {
            const std::int64_t first = next.fetch_add(rows);
            if (first >= num_rows) return;
            run(first, std::min(first + rows, num_rows));
        }
    };
    if (start_team)
        run_in_team(start_team, work, count);
    else
        run_in_threads(work, count);
}

}  // namespace fuserl

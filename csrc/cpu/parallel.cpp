#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fuserl {
namespace {

constexpr std::int64_t kThreadWork = 1 << 18;  // elements that pay for starting a thread
constexpr std::int64_t kTeamWork = 1 << 15;    // elements that pay for waking a waiting one
constexpr std::int64_t kHelpedWork = 1 << 12;  // elements that pay for a helper that stands by
constexpr int kSpins = 4096;                   // looks for work before the core is offered to others
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

// Threads that stand by while a body runs.
class Helpers {
   public:
    // One call of parallel_rows, alive until nobody is inside.
    using Work = const std::function<void()>*;

    // On the thread that has work.
    void share(const std::function<void()>& work) {
        // Whatever happens, nobody is inside when `work` ends its life.
        struct Guard {
            Helpers& helpers;
            ~Guard() {
                helpers.work_.store(nullptr);
                while (helpers.inside_.load() != 0) pause();
            }
        } guard{*this};
        work_.store(&work);
        turn_.fetch_add(1);
        work();  // until all of it is taken
    }

    void dismiss() { is_over_.store(true); }

    // On a helper.
    void stand_by() {
        std::uint64_t done = 0;
        for (int spins = 0; !is_over_.load();) {
            const std::uint64_t turn = turn_.load();
            if (turn == done) {
                if (++spins < kSpins) {
                    pause();
                } else {
                    std::this_thread::yield();
                }
                continue;
            }
            spins = 0;
            done = turn;
            inside_.fetch_add(1);  // before the look: what is seen stays until this one is out
            if (const Work work = work_.load()) (*work)();
            inside_.fetch_sub(1);
        }
    }

   private:
    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    alignas(64) std::atomic<Work> work_{nullptr};
    alignas(64) std::atomic<std::uint64_t> turn_{0};
    alignas(64) std::atomic<int> inside_{0};
    std::atomic<bool> is_over_{false};
};

thread_local Helpers* standing_by = nullptr;  // those of the body that this thread runs

StartTeam team() {
    static const StartTeam start_team = find_team();
    return start_team;
}

}  // namespace

void with_helpers(int num_threads, const std::function<void()>& body) {
    if (num_threads <= 1 || standing_by) return body();
    Helpers helpers;
    const std::thread::id caller = std::this_thread::get_id();
    std::exception_ptr error;
    auto part = [&] {
        if (std::this_thread::get_id() != caller) return helpers.stand_by();
        standing_by = &helpers;
        try {
            body();
        } catch (...) {  // not through the threads' runtime
            error = std::current_exception();
        }
        standing_by = nullptr;
        helpers.dismiss();
    };
    if (const StartTeam start = team())
        run_in_team(start, part, num_threads);
    else
        run_in_threads(part, num_threads);
    if (error) std::rethrow_exception(error);
}

void parallel_rows(std::int64_t num_rows, std::int64_t row_size, int num_threads,
                   const std::function<void(std::int64_t, std::int64_t)>& run) {
    const StartTeam start_team = team();
    Helpers* const helpers = standing_by;
    const std::int64_t least = helpers ? kHelpedWork : start_team ? kTeamWork : kThreadWork;
    const std::int64_t worth = num_rows * row_size / least;
    const std::int64_t count =
        std::max<std::int64_t>(1, std::min<std::int64_t>({num_threads, num_rows, worth}));
    if (count == 1) return run(0, num_rows);

    // Short runs, taken as threads come free: masked rows cost nothing, so equal shares would not
    // be equal work.
    const std::int64_t share = (num_rows + count - 1) / count;
    // A helper may come late: half a share at a time lets the others take what it would have had.
    const std::int64_t most = helpers ? (share + 1) / 2 : share;
    const std::int64_t rows = std::max<std::int64_t>(1, std::min(kRunWork / row_size, most));
    std::atomic<std::int64_t> next{0};
    auto work = [&] {
        for (;;) {
            const std::int64_t first = next.fetch_add(rows);
            if (first >= num_rows) return;
            run(first, std::min(first + rows, num_rows));
        }
    };
    if (helpers)
        helpers->share(work);
    else if (start_team)
        run_in_team(start_team, work, count);
    else
        run_in_threads(work, count);
}

}  // namespace fuserl

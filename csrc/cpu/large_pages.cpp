#include "large_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fuserl {

void advise_large_pages(void* memory, std::int64_t num_bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t kPage = 2 << 20;
    const auto start = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t first = (start + kPage - 1) / kPage * kPage;
    const std::uintptr_t last = (start + num_bytes) / kPage * kPage;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)num_bytes;
#endif
}

}  // namespace fuserl

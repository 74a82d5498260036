// Memory that nobody has touched comes from the system by the page, and most of the time of a
// kernel that fills it would go there: ask for pages of 2 MB. It is advice; where the system does
// not take it, the pages stay small.
#pragma once

#include <cstdint>

namespace fuserl {

void advise_large_pages(void* memory, std::int64_t num_bytes);

}  // namespace fuserl

// Rows dealt out to threads. Each is computed alone, so who does it changes no result.
#pragma once

#include <cstdint>
#include <functional>

namespace fuserl {

// Call run(first, last) on runs of rows that cover [0, num_rows) once, from up to num_threads
// threads; row_size in elements. As with torch's own operations, a process forked after a call on
// several threads may make none on several.
void parallel_rows(std::int64_t num_rows, std::int64_t row_size, int num_threads,
                   const std::function<void(std::int64_t, std::int64_t)>& run);

// Run body() on this thread with helpers standing by: calls of parallel_rows inside it hand them work
// in a fraction of a microsecond, and wait for those alone that took some. So many short operations
// in a row are worth sharing out, and a helper that the system has put aside holds nothing up.
void with_helpers(int num_threads, const std::function<void()>& body);

}  // namespace fuserl

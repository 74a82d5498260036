// Python's view of cpu/decode_attention.h.

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cpu/decode_attention.h"

namespace {

// Items, capacity; strides of item, head and token of the keys, then of the values.
using Layout = std::array<Size, 8>;

fuserl::KeyValues key_values(Address keys, Address values, const Layout& layout) {
    return {at<const void>(keys), at<const void>(values), layout[0], layout[1], layout[2],
            layout[3],            layout[4],              layout[5], layout[6], layout[7]};
}

void decode_attention(Dtype dtype, Address query, const std::array<Size, 3>& query_shape,
                      const std::array<Size, 2>& query_strides, Size num_kv_heads,
                      Address key_cache, Address value_cache, const Layout& cache_layout,
                      Address lengths, Address slots, Address prefix_keys, Address prefix_values,
                      const Layout& prefix_layout, Address prefix_ids, Address prefix_lengths,
                      float scale, Size window, float softcap, Address out, int num_threads) {
    fuserl::decode_attention(
        {dtype, at<const void>(query), query_shape[0], query_shape[1], num_kv_heads, query_shape[2],
         query_strides[0], query_strides[1], key_values(key_cache, value_cache, cache_layout),
         at<const std::int64_t>(lengths), at<const std::int64_t>(slots),
         key_values(prefix_keys, prefix_values, prefix_layout), at<const std::int64_t>(prefix_ids),
         at<const std::int64_t>(prefix_lengths), scale, window, softcap, at<void>(out)},
        num_threads);
}

}  // namespace

void bind_decode_attention(py::module_& module) {
    module.def("decode_attention", &decode_attention, py::kw_only(), "dtype"_a, "query"_a,
               "query_shape"_a, "query_strides"_a, "num_kv_heads"_a, "key_cache"_a, "value_cache"_a,
               "cache_layout"_a, "lengths"_a, "slots"_a, "prefix_keys"_a, "prefix_values"_a,
               "prefix_layout"_a, "prefix_ids"_a, "prefix_lengths"_a, "scale"_a, "window"_a,
               "softcap"_a, "out"_a, "num_threads"_a, Unlocked());
}

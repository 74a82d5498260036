// Python's view of cpu/rotary.h.

#include "bindings.h"

#include "cpu/rotary.h"

namespace {

// What both passes take.
#define ROTARY_PARAMETERS                                                                          \
    Dtype dtype, Size num_tokens, Size num_heads, Size num_kv_heads, Size head_dim, Address qkv,   \
        Size qkv_stride, Address cos, Address sin, Size half, Size cos_stride, Size sin_stride,    \
        bool interleaved, Address positions, Address q_weight, Dtype q_weight_dtype,               \
        Address k_weight, Dtype k_weight_dtype, double eps, float weight_offset
#define ROTARY_NAMES                                                                              \
    "dtype"_a, "num_tokens"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "qkv"_a,            \
        "qkv_stride"_a, "cos"_a, "sin"_a, "half"_a, "cos_stride"_a, "sin_stride"_a,               \
        "interleaved"_a, "positions"_a, "q_weight"_a, "q_weight_dtype"_a, "k_weight"_a,           \
        "k_weight_dtype"_a, "eps"_a, "weight_offset"_a
#define ROTARY_SIZES {num_tokens, num_heads, num_kv_heads, head_dim}
#define ROTARY_TABLES                                                                    \
    {at<const float>(cos), at<const float>(sin), half,                                   \
     cos_stride,           sin_stride,           interleaved,                            \
     at<const std::int64_t>(positions)}
#define ROTARY_NORM                                       \
    {{at<const void>(q_weight), at<const void>(k_weight)}, \
     {q_weight_dtype, k_weight_dtype},                    \
     eps,                                                 \
     weight_offset}

void forward(ROTARY_PARAMETERS, Address query, Address key, Size key_row_stride,
             Size key_head_stride, Size key_offset_stride, Address value, Size value_row_stride,
             Size value_head_stride, Size value_offset_stride, Address slots, Address offsets,
             int num_threads) {
    fuserl::rotary_forward(
        {ROTARY_SIZES,
         dtype,
         at<const void>(qkv),
         qkv_stride,
         ROTARY_TABLES,
         ROTARY_NORM,
         {at<void>(query), num_heads * head_dim, head_dim, 0},
         {at<void>(key), key_row_stride, key_head_stride, key_offset_stride},
         {at<void>(value), value_row_stride, value_head_stride, value_offset_stride},
         at<const std::int64_t>(slots),
         at<const std::int64_t>(offsets)},
        num_threads);
}

void backward(ROTARY_PARAMETERS, Address grad_query, Size query_token_stride,
              Size query_head_stride, Address grad_key, Size key_token_stride, Size key_head_stride,
              Address grad_value, Size value_token_stride, Size value_head_stride,
              Address grad_qkv, Address grad_weights, int num_threads) {
    fuserl::rotary_backward({ROTARY_SIZES,
                             dtype,
                             {at<const void>(grad_query), query_token_stride, query_head_stride},
                             {at<const void>(grad_key), key_token_stride, key_head_stride},
                             {at<const void>(grad_value), value_token_stride, value_head_stride},
                             ROTARY_TABLES,
                             ROTARY_NORM,
                             at<const void>(qkv),
                             qkv_stride,
                             at<void>(grad_qkv),
                             at<float>(grad_weights)},
                            num_threads);
}

}  // namespace

void bind_rotary(py::module_& module) {
    module.def("rotary_forward", &forward, py::kw_only(), ROTARY_NAMES, "query"_a, "key"_a,
               "key_row_stride"_a, "key_head_stride"_a, "key_offset_stride"_a, "value"_a,
               "value_row_stride"_a, "value_head_stride"_a, "value_offset_stride"_a, "slots"_a,
               "offsets"_a, "num_threads"_a, Unlocked());
    module.def("rotary_backward", &backward, py::kw_only(), ROTARY_NAMES, "grad_query"_a,
               "query_token_stride"_a, "query_head_stride"_a, "grad_key"_a, "key_token_stride"_a,
               "key_head_stride"_a, "grad_value"_a, "value_token_stride"_a, "value_head_stride"_a,
               "grad_qkv"_a, "grad_weights"_a, "num_threads"_a, Unlocked());
}

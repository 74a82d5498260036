// Python's view of cpu/decoder.h: an object that is told of its weights and caches by address.

#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "cpu/decoder.h"

namespace {

using fuserl::NativeDecoder;
// Panels, number of outputs and of inputs, bias.
using Linear = std::tuple<Address, Size, Size, Address>;
using Norm = std::pair<Address, Address>;  // weight, bias

fuserl::LinearWeights linear_of(Dtype dtype, const Linear& linear) {
    const auto& [panels, num_outputs, num_inputs, bias] = linear;
    return {{at<const void>(panels), dtype, num_outputs, num_inputs}, at<const void>(bias)};
}

fuserl::NormWeights norm_of(const Norm& norm) {
    return {at<const void>(norm.first), at<const void>(norm.second)};
}

void add_layer(NativeDecoder& decoder, const Norm& attn_norm, const Norm& mlp_norm,
               const Norm& post_attn_norm, const Norm& post_mlp_norm, const Linear& qkv,
               const Linear& attn_out, const Linear& gate_up, const Linear& down, Address q_norm,
               Address k_norm, bool interleaved, Size window) {
    const Dtype dtype = decoder.shape.dtype;
    fuserl::DecoderLayer layer;
    layer.attn_norm = norm_of(attn_norm);
    layer.mlp_norm = norm_of(mlp_norm);
    layer.post_attn_norm = norm_of(post_attn_norm);
    layer.post_mlp_norm = norm_of(post_mlp_norm);
    layer.qkv = linear_of(dtype, qkv);
    layer.attn_out = linear_of(dtype, attn_out);
    layer.gate_up = linear_of(dtype, gate_up);
    layer.down = linear_of(dtype, down);
    layer.q_norm = at<const void>(q_norm);
    layer.k_norm = at<const void>(k_norm);
    layer.interleaved = interleaved;
    layer.window = window;
    decoder.layers.push_back(layer);
}

// The tables of each layer, in order: cosines, sines, and columns of both.
void set_rotary(NativeDecoder& decoder, const std::vector<std::tuple<Address, Address, Size>>& of) {
    for (std::size_t i = 0; i < of.size(); ++i) {
        const auto& [cos, sin, half] = of[i];
        decoder.layers.at(i).cos = at<const float>(cos);
        decoder.layers.at(i).sin = at<const float>(sin);
        decoder.layers.at(i).half = half;
    }
}

void set_cache(NativeDecoder& decoder, Address keys, Address values, Size num_slots, Size capacity,
               Address prompt_keys, Address prompt_values, Size num_prompts, Size prompt_capacity,
               Address prompt_lengths) {
    decoder.cache = {{at<void>(keys), at<void>(values), num_slots, capacity},
                     {at<void>(prompt_keys), at<void>(prompt_values), num_prompts, prompt_capacity},
                     at<const std::int64_t>(prompt_lengths)};
}

void prefill(NativeDecoder& decoder, Size num_rows, Address token_ids, Address positions,
             Address prompt_ids, Address wanted, Size num_wanted, Address hidden,
             Address kept_streams, Address kept_at, int num_threads) {
    const auto* places = at<const std::int64_t>(positions);
    decoder.prefill({num_rows, at<const std::int64_t>(token_ids), places, nullptr,
                     at<const std::int64_t>(prompt_ids), places, at<void>(kept_streams),
                     at<const std::int64_t>(kept_at)},
                    at<const std::int64_t>(wanted), num_wanted, at<void>(hidden), num_threads);
}

// Returns steps, live rows, ended rows and flagged tokens.
std::tuple<Size, Size, Size, Size> decode(
    NativeDecoder& decoder, Size num_rows, Address slots, Address prompt_ids, Address lengths,
    Address limits, Address request_ids, Address hidden, Address token_ids, Address logprobs,
    Address truncated_logprobs, Address ended_slots, Address ended_lengths, Address ended_by,
    Address kept_streams, double temperature, Size top_k, double top_p, double min_p,
    std::uint64_t seed, Address is_stop, Address is_flag, Size max_steps, Size enough,
    int num_threads) {
    fuserl::DecodeRows rows{num_rows,
                            at<std::int64_t>(slots),
                            at<std::int64_t>(prompt_ids),
                            at<std::int64_t>(lengths),
                            at<std::int64_t>(limits),
                            at<std::int64_t>(request_ids),
                            at<void>(hidden),
                            at<std::int64_t>(token_ids),
                            at<float>(logprobs),
                            at<float>(truncated_logprobs),
                            0,
                            at<std::int64_t>(ended_slots),
                            at<std::int64_t>(ended_lengths),
                            at<std::int64_t>(ended_by),
                            at<void>(kept_streams),
                            0};
    const fuserl::DrawRule rule{temperature, top_p, min_p, top_k, seed, at<const bool>(is_stop),
                                at<const bool>(is_flag)};
    const Size steps = decoder.decode(rows, rule, max_steps, enough, num_threads);
    return {steps, rows.num_rows, rows.num_ended, rows.num_flagged};
}

NativeDecoder* make(Dtype dtype, Size hidden_size, Size intermediate_size, Size num_heads,
                    Size num_kv_heads, Size head_dim, double norm_eps, float norm_offset,
                    bool norm_centered, const std::string& activation, float attention_scale,
                    float attention_softcap, float final_softcap, float embedding_scale,
                    Address embedding, Size vocab_size, const Norm& final_norm, const Linear& head,
                    Size kept_layer) {
    auto* decoder = new NativeDecoder;
    decoder->shape = {dtype,           hidden_size,   intermediate_size,
                      num_heads,       num_kv_heads,  head_dim,
                      norm_eps,        norm_offset,   norm_centered,
                      activation_of(activation), attention_scale, attention_softcap,
                      final_softcap,   embedding_scale};
    decoder->embedding = at<const void>(embedding);
    decoder->vocab_size = vocab_size;
    decoder->final_norm = norm_of(final_norm);
    decoder->head = linear_of(dtype, head);
    decoder->kept_layer = kept_layer;
    return decoder;
}

}  // namespace

void bind_decoder(py::module_& module) {
    py::class_<NativeDecoder>(module, "Decoder")
        .def(py::init(&make), py::kw_only(), "dtype"_a, "hidden_size"_a, "intermediate_size"_a,
             "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "norm_eps"_a, "norm_offset"_a,
             "norm_centered"_a, "activation"_a, "attention_scale"_a, "attention_softcap"_a,
             "final_softcap"_a, "embedding_scale"_a, "embedding"_a, "vocab_size"_a, "final_norm"_a,
             "head"_a, "kept_layer"_a)
        .def("add_layer", &add_layer, py::kw_only(), "attn_norm"_a, "mlp_norm"_a,
             "post_attn_norm"_a, "post_mlp_norm"_a, "qkv"_a, "attn_out"_a, "gate_up"_a, "down"_a,
             "q_norm"_a, "k_norm"_a, "interleaved"_a, "window"_a)
        .def("set_rotary", &set_rotary, "tables"_a)
        .def("set_cache", &set_cache, py::kw_only(), "keys"_a, "values"_a, "num_slots"_a,
             "capacity"_a, "prompt_keys"_a, "prompt_values"_a, "num_prompts"_a,
             "prompt_capacity"_a, "prompt_lengths"_a)
        .def("prefill", &prefill, py::kw_only(), "num_rows"_a, "token_ids"_a, "positions"_a,
             "prompt_ids"_a, "wanted"_a, "num_wanted"_a, "hidden"_a, "kept_streams"_a, "kept_at"_a,
             "num_threads"_a, Unlocked())
        .def("decode", &decode, py::kw_only(), "num_rows"_a, "slots"_a, "prompt_ids"_a,
             "lengths"_a, "limits"_a, "request_ids"_a, "hidden"_a, "token_ids"_a, "logprobs"_a,
             "truncated_logprobs"_a, "ended_slots"_a, "ended_lengths"_a, "ended_by"_a,
             "kept_streams"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a,
             "is_stop"_a, "is_flag"_a, "max_steps"_a, "enough"_a, "num_threads"_a, Unlocked());
}

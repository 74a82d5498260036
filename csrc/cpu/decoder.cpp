#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "decode_attention.h"
#include "norms.h"
#include "parallel.h"
#include "rotary.h"
#include "sampling.h"

namespace fuserl {
namespace {

constexpr std::int64_t kDrawnTogether = 64;  // rows whose logits are there at a time

float widened(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// To the nearest bfloat16, ties to even.
std::uint16_t narrowed(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

char* row_of(void* rows, std::int64_t row, std::int64_t row_bytes) {
    return static_cast<char*>(rows) + row * row_bytes;
}

const char* row_of(const void* rows, std::int64_t row, std::int64_t row_bytes) {
    return static_cast<const char*>(rows) + row * row_bytes;
}

// One layer of an arena.
KeyValues layer_of(const Arena& arena, std::size_t layer, const DecoderShape& shape) {
    const std::int64_t head = arena.capacity * shape.head_dim;
    const std::int64_t item = shape.num_kv_heads * head;
    const std::int64_t start =
        static_cast<std::int64_t>(layer) * arena.num_items * item * size_of(shape.dtype);
    return {static_cast<const char*>(arena.keys) + start,
            static_cast<const char*>(arena.values) + start,
            arena.num_items,
            arena.capacity,
            item,
            head,
            shape.head_dim,
            item,
            head,
            shape.head_dim};
}

}  // namespace

void* NativeDecoder::Room::of(std::int64_t num_bytes) {
    const auto needed = static_cast<std::size_t>(num_bytes) + 64;
    if (bytes_.size() < needed) {
        bytes_.clear();  // nothing is copied
        bytes_.resize(needed);
    }
    const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

void NativeDecoder::embed(const TokenRows& rows, void* stream) const {
    const std::int64_t size = shape.hidden_size, row_bytes = size * size_of(shape.dtype);
    const float scale = shape.embedding_scale;  // already of the decoder's dtype
    for (std::int64_t i = 0; i < rows.num_rows; ++i) {
        const std::int64_t token = rows.token_ids[i];
        if (token < 0 || token >= vocab_size)
            throw std::invalid_argument("token id " + std::to_string(token) +
                                        " is outside the vocabulary");
        const char* source = row_of(embedding, token, row_bytes);
        char* target = row_of(stream, i, row_bytes);
        std::memcpy(target, source, static_cast<std::size_t>(row_bytes));
        if (scale == 1.0f) continue;
        if (shape.dtype == Dtype::kFloat32) {
            auto* x = reinterpret_cast<float*>(target);
            for (std::int64_t c = 0; c < size; ++c) x[c] *= scale;
        } else {
            auto* x = reinterpret_cast<std::uint16_t*>(target);
            for (std::int64_t c = 0; c < size; ++c) x[c] = narrowed(widened(x[c]) * scale);
        }
    }
}

void NativeDecoder::keep(const TokenRows& rows, const void* stream) const {
    const std::int64_t row_bytes = shape.hidden_size * size_of(shape.dtype);
    for (std::int64_t i = 0; i < rows.num_rows; ++i)
        std::memcpy(row_of(rows.kept_streams, rows.kept_at[i], row_bytes),
                    row_of(stream, i, row_bytes), static_cast<std::size_t>(row_bytes));
}

// out = norm(rows + residual); the sum, rounded, to `summed`.
void NativeDecoder::norm(const NormWeights& weights, const void* rows, const void* residual,
                         void* out, void* summed, std::int64_t num_rows, int num_threads) {
    norm_forward({{rows, shape.dtype, num_rows, shape.hidden_size, 1, shape.hidden_size, 0,
                   weights.weight, shape.dtype, shape.norm_offset, shape.norm_centered},
                  weights.bias, shape.dtype, residual, shape.norm_eps, out, summed,
                  stats_.array<float>(2 * num_rows)},
                 num_threads);
}

void NativeDecoder::linear(const LinearWeights& weights, const void* rows, void* out,
                           std::int64_t num_rows, int num_threads) const {
    product({rows, num_rows, weights.weight.num_inputs, 1, weights.weight, weights.bias, out,
             shape.dtype, weights.weight.num_outputs},
            num_threads);
}

void NativeDecoder::attend(std::size_t index, const TokenRows& rows, const void* qkv, void* query,
                           void* out, int num_threads) {
    const DecoderLayer& layer = layers[index];
    const bool in_slots = rows.slots != nullptr;
    const Arena& written = in_slots ? cache.slots : cache.prompts;
    const std::int64_t* items = in_slots ? rows.slots : rows.prompt_ids;
    const KeyValues target = layer_of(written, index, shape);
    rotary_forward({{rows.num_rows, shape.num_heads, shape.num_kv_heads, shape.head_dim},
                    shape.dtype,
                    qkv,
                    shape.qkv_size(),
                    {layer.cos, layer.sin, layer.half, layer.half, layer.half, layer.interleaved,
                     rows.positions},
                    {{layer.q_norm, layer.k_norm},
                     {shape.dtype, shape.dtype},
                     shape.norm_eps,
                     shape.norm_offset},
                    {query, shape.heads_size(), shape.head_dim, 0},
                    {const_cast<void*>(target.keys), target.key_item_stride, target.key_head_stride,
                     target.key_token_stride},
                    {const_cast<void*>(target.values), target.value_item_stride,
                     target.value_head_stride, target.value_token_stride},
                    items,
                    rows.offsets},
                   num_threads);
    auto* lengths = lengths_.array<std::int64_t>(rows.num_rows);
    for (std::int64_t i = 0; i < rows.num_rows; ++i) lengths[i] = rows.offsets[i] + 1;
    DecodeAttention task{shape.dtype,
                         query,
                         rows.num_rows,
                         shape.num_heads,
                         shape.num_kv_heads,
                         shape.head_dim,
                         shape.heads_size(),
                         shape.head_dim,
                         target,
                         lengths,
                         items,
                         {},
                         nullptr,
                         nullptr,
                         shape.attention_scale,
                         layer.window,
                         shape.attention_softcap,
                         out};
    if (in_slots) {
        task.prefixes = layer_of(cache.prompts, index, shape);
        task.prefix_ids = rows.prompt_ids;
        task.prefix_lengths = cache.prompt_lengths;
    }
    decode_attention(task, num_threads);
}

void NativeDecoder::prefill(const TokenRows& rows, const std::int64_t* wanted,
                            std::int64_t num_wanted, void* hidden, int num_threads) {
    with_helpers(num_threads, [&] { forward(rows, wanted, num_wanted, hidden, num_threads); });
}

std::int64_t NativeDecoder::decode(DecodeRows& rows, const DrawRule& rule, std::int64_t max_steps,
                                   std::int64_t enough, int num_threads) {
    std::int64_t steps = 0;
    with_helpers(num_threads,
                 [&] { steps = decode_loop(rows, rule, max_steps, enough, num_threads); });
    return steps;
}

void NativeDecoder::forward(const TokenRows& rows, const std::int64_t* wanted,
                            std::int64_t num_wanted, void* hidden, int num_threads) {
    const std::int64_t n = rows.num_rows, element = size_of(shape.dtype);
    const std::int64_t row_bytes = shape.hidden_size * element;
    const auto room = [&](Room& of, std::int64_t size) { return of.of(n * size * element); };
    void* stream = room(stream_, shape.hidden_size);
    void* summed = room(summed_, shape.hidden_size);
    void* branch = room(branch_, shape.hidden_size);
    void* normed = room(normed_, shape.hidden_size);
    void* qkv = room(qkv_, shape.qkv_size());
    void* query = room(query_, shape.heads_size());
    void* attended = room(attended_, shape.heads_size());
    void* gate_up = room(gate_up_, 2 * shape.intermediate_size);
    void* activated = room(activated_, shape.intermediate_size);

    // As in decoder.py, the stream and the branch not yet added to it: adding is the norm's.
    const auto add_and_norm = [&](const NormWeights& weights, bool has_branch) {
        if (!has_branch) return norm(weights, stream, nullptr, normed, nullptr, n, num_threads);
        norm(weights, branch, stream, normed, summed, n, num_threads);
        std::swap(stream, summed);
    };
    const auto norm_branch = [&](const NormWeights& weights) {
        if (!weights.weight) return;
        norm(weights, branch, nullptr, normed, nullptr, n, num_threads);
        std::swap(branch, normed);
    };

    embed(rows, stream);
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const DecoderLayer& layer = layers[i];
        add_and_norm(layer.attn_norm, i > 0);
        if (rows.kept_streams && static_cast<std::int64_t>(i) == kept_layer) keep(rows, stream);
        linear(layer.qkv, normed, qkv, n, num_threads);
        attend(i, rows, qkv, query, attended, num_threads);
        linear(layer.attn_out, attended, branch, n, num_threads);
        norm_branch(layer.post_attn_norm);
        add_and_norm(layer.mlp_norm, true);
        linear(layer.gate_up, normed, gate_up, n, num_threads);
        glu_forward({shape.activation, shape.dtype, gate_up, n, shape.intermediate_size,
                     2 * shape.intermediate_size, nullptr, 0, activated},
                    num_threads);
        linear(layer.down, activated, branch, n, num_threads);
        norm_branch(layer.post_mlp_norm);
    }
    if (num_wanted == 0) return;
    void* last_branch = gathered_branch_.of(num_wanted * row_bytes);
    void* last_stream = gathered_stream_.of(num_wanted * row_bytes);
    for (std::int64_t i = 0; i < num_wanted; ++i) {
        const auto bytes = static_cast<std::size_t>(row_bytes);
        std::memcpy(row_of(last_branch, i, row_bytes), row_of(branch, wanted[i], row_bytes), bytes);
        std::memcpy(row_of(last_stream, i, row_bytes), row_of(stream, wanted[i], row_bytes), bytes);
    }
    norm(final_norm, last_branch, last_stream, hidden, summed_.of(num_wanted * row_bytes),
         num_wanted, num_threads);
}

void NativeDecoder::draw(const DecodeRows& rows, const DrawRule& rule, const Drawn& drawn,
                         int num_threads) {
    const std::int64_t row_bytes = shape.hidden_size * size_of(shape.dtype);
    for (std::int64_t first = 0; first < rows.num_rows; first += kDrawnTogether) {
        const std::int64_t count = std::min(kDrawnTogether, rows.num_rows - first);
        auto* logits = logits_.array<float>(count * vocab_size);
        product({row_of(rows.hidden, first, row_bytes), count, shape.hidden_size, 1,
                 head.weight, head.bias, logits, Dtype::kFloat32, vocab_size},
                num_threads);
        if (shape.final_softcap != 0.0f)
            cap_logits(logits, count, vocab_size, shape.final_softcap, num_threads);
        sample_tokens({logits, Dtype::kFloat32, count, vocab_size, vocab_size, rule.temperature,
                       rule.top_k, rule.top_p, rule.min_p, rule.seed, rows.request_ids + first,
                       rows.lengths + first, drawn.token_ids + first, drawn.logprobs + first,
                       drawn.truncated_logprobs + first},
                      num_threads);
    }
}

std::int64_t NativeDecoder::decode_loop(DecodeRows& rows, const DrawRule& rule,
                                        std::int64_t max_steps, std::int64_t enough,
                                        int num_threads) {
    rows.num_ended = rows.num_flagged = 0;
    const std::int64_t capacity = cache.slots.capacity, most = rows.num_rows;
    const Drawn drawn{drawn_ids_.array<std::int64_t>(most), drawn_logprobs_.array<float>(most),
                      drawn_truncated_.array<float>(most)};
    auto* numbers = numbers_.array<std::int64_t>(7 * most);
    std::int64_t *token_ids = numbers, *positions = numbers + most, *slots = numbers + 2 * most,
                 *prompt_ids = numbers + 3 * most, *offsets = numbers + 4 * most,
                 *kept_at = numbers + 5 * most, *wanted = numbers + 6 * most;
    std::int64_t step = 0;
    while (step < max_steps && rows.num_rows > 0 && rows.num_ended < enough &&
           rows.num_flagged == 0) {
        draw(rows, rule, drawn, num_threads);
        ++step;
        std::int64_t num_tokens = 0, num_live = 0;
        for (std::int64_t i = 0; i < rows.num_rows; ++i) {
            const std::int64_t token = drawn.token_ids[i], slot = rows.slots[i];
            const std::int64_t offset = rows.lengths[i], at = slot * capacity + offset;
            rows.token_ids[at] = token;
            rows.logprobs[at] = drawn.logprobs[i];
            rows.truncated_logprobs[at] = drawn.truncated_logprobs[i];
            std::int64_t end = 0;
            if (token < 0)
                end = kBroken;
            else if (rule.is_stop && rule.is_stop[token])
                end = kByStop;
            else if (offset + 1 >= rows.limits[i])
                end = kByLimit;
            if (end != 0) {
                rows.ended_slots[rows.num_ended] = slot;
                rows.ended_lengths[rows.num_ended] = offset + 1;
                rows.ended_by[rows.num_ended++] = end;
            }
            if (end == kBroken) continue;
            // The stream of a last token is wanted too, where streams are kept.
            if (end == 0 || rows.kept_streams) {
                token_ids[num_tokens] = token;
                positions[num_tokens] = cache.prompt_lengths[rows.prompt_ids[i]] + offset;
                slots[num_tokens] = slot;
                prompt_ids[num_tokens] = rows.prompt_ids[i];
                offsets[num_tokens] = offset;
                kept_at[num_tokens] = at;
                if (end == 0) wanted[num_live] = num_tokens;
                ++num_tokens;
            }
            if (end != 0) continue;
            if (rule.is_flag && rule.is_flag[token]) ++rows.num_flagged;
            rows.slots[num_live] = slot;
            rows.prompt_ids[num_live] = rows.prompt_ids[i];
            rows.lengths[num_live] = offset + 1;
            rows.limits[num_live] = rows.limits[i];
            rows.request_ids[num_live++] = rows.request_ids[i];
        }
        rows.num_rows = num_live;
        if (num_tokens > 0)
            forward({num_tokens, token_ids, positions, slots, prompt_ids, offsets,
                     rows.kept_streams, kept_at},
                    wanted, num_live, rows.hidden, num_threads);
    }
    return step;
}

}  // namespace fuserl

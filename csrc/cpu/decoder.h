// A decoder's forward pass and its decode loop on the CPU, in one call for many tokens: the ops of
// this folder in the order in which engine/fuserl/model/decoder.py calls them, with the same bits.
//
// It reads packed weights and a cache of keys and values that belong to the caller. Rows are
// independent of one another: a token's numbers do not change with what is computed beside it.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "glu.h"
#include "product.h"

namespace fuserl {

// [num_outputs, num_inputs] and [num_outputs], or no bias.
struct LinearWeights {
    PackedWeight weight{};
    const void* bias = nullptr;
};

// Of the decoder's dtype; a null weight stands for no norm.
struct NormWeights {
    const void* weight = nullptr;
    const void* bias = nullptr;
};

struct DecoderLayer {
    NormWeights attn_norm, mlp_norm, post_attn_norm, post_mlp_norm;
    LinearWeights qkv, attn_out, gate_up, down;
    const void* q_norm = nullptr;  // [head_dim]
    const void* k_norm = nullptr;
    const float* cos = nullptr;  // [positions, half], contiguous
    const float* sin = nullptr;
    std::int64_t half = 0;
    bool interleaved = false;
    std::int64_t window = 0;  // 0 for none
};

struct DecoderShape {
    Dtype dtype;
    std::int64_t hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
    double norm_eps;
    float norm_offset;
    bool norm_centered;
    Activation activation;
    float attention_scale, attention_softcap;  // softcap 0 for none
    float final_softcap;
    float embedding_scale;

    std::int64_t heads_size() const { return num_heads * head_dim; }
    std::int64_t qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

// Keys and values [num_layers, num_items, num_kv_heads, capacity, head_dim] each, contiguous; an
// item is a slot or a prompt.
struct Arena {
    void* keys = nullptr;
    void* values = nullptr;
    std::int64_t num_items = 0, capacity = 0;
};

struct DecoderCache {
    Arena slots, prompts;
    const std::int64_t* prompt_lengths = nullptr;  // [prompts.num_items]
};

// N tokens of one pass. Those of a prompt are written to it at their positions and see what stands
// before them there; those of completions are written to their slots behind prompts.
struct TokenRows {
    std::int64_t num_rows;
    const std::int64_t* token_ids;   // [num_rows]
    const std::int64_t* positions;   // [num_rows], in the whole sequence
    const std::int64_t* slots;       // [num_rows], or null: the tokens are prompts'
    const std::int64_t* prompt_ids;  // [num_rows]
    const std::int64_t* offsets;     // [num_rows]: place in the slot, or in the prompt
    // Where the residual stream before layer NativeDecoder::kept_layer goes, [.., hidden_size], and
    // to which row of it, [num_rows]; null where none is kept.
    void* kept_streams;
    const std::int64_t* kept_at;
};

// How tokens are drawn: as Sampling of sampling.h.
struct DrawRule {
    double temperature, top_p, min_p;
    std::int64_t top_k;
    std::uint64_t seed;
    const bool* is_stop;  // [vocab_size], or null
    const bool* is_flag;  // [vocab_size], or null: see DecodeRows::num_flagged
};

// The live rows of a decode loop, in arrays with room for max_rows.
struct DecodeRows {
    std::int64_t num_rows;
    std::int64_t* slots;
    std::int64_t* prompt_ids;
    std::int64_t* lengths;  // completion tokens so far
    std::int64_t* limits;
    std::int64_t* request_ids;
    void* hidden;  // [max_rows, hidden_size]: after the final norm, of the last token
    // By slot, [num_slots, capacity].
    std::int64_t* token_ids;
    float* logprobs;
    float* truncated_logprobs;
    // Rows that ended in this call: slot, length, and why.
    std::int64_t num_ended;
    std::int64_t* ended_slots;
    std::int64_t* ended_lengths;
    std::int64_t* ended_by;  // an End
    void* kept_streams;      // [num_slots, capacity, hidden_size], or null
    std::int64_t num_flagged;  // tokens with is_flag that live rows drew in this call
};

enum End : std::int64_t { kByStop = 1, kByLimit = 2, kBroken = 3 };

class NativeDecoder {
   public:
    DecoderShape shape{};
    const void* embedding = nullptr;  // [vocab_size, hidden_size]
    std::int64_t vocab_size = 0;
    NormWeights final_norm;
    LinearWeights head;
    std::vector<DecoderLayer> layers;
    DecoderCache cache;
    std::int64_t kept_layer = 0;  // above the lowest; 0: no stream is kept

    // The pass of `rows`; the final hidden states of the rows `wanted` [num_wanted] go to `hidden`.
    void prefill(const TokenRows& rows, const std::int64_t* wanted, std::int64_t num_wanted,
                 void* hidden, int num_threads);

    // Draw a token for each live row, take away those that end, and run the others' pass, until
    // max_steps tokens a row are drawn, no row is live, `enough` rows have ended, or a flagged
    // token was drawn. Returns the number of steps made.
    std::int64_t decode(DecodeRows& rows, const DrawRule& rule, std::int64_t max_steps,
                        std::int64_t enough, int num_threads);

   private:
    // Memory that is kept from call to call.
    class Room {
       public:
        void* of(std::int64_t num_bytes);  // 64-byte aligned; what it held is lost

        template <typename T>
        T* array(std::int64_t count) {
            return static_cast<T*>(of(count * static_cast<std::int64_t>(sizeof(T))));
        }

       private:
        std::vector<std::uint8_t> bytes_;
    };

    // What is drawn for each row of a step.
    struct Drawn {
        std::int64_t* token_ids;
        float* logprobs;
        float* truncated_logprobs;
    };

    void forward(const TokenRows& rows, const std::int64_t* wanted, std::int64_t num_wanted,
                 void* hidden, int num_threads);
    std::int64_t decode_loop(DecodeRows& rows, const DrawRule& rule, std::int64_t max_steps,
                             std::int64_t enough, int num_threads);
    void embed(const TokenRows& rows, void* stream) const;
    void keep(const TokenRows& rows, const void* stream) const;
    void norm(const NormWeights& weights, const void* rows, const void* residual, void* out,
              void* summed, std::int64_t num_rows, int num_threads);
    void linear(const LinearWeights& weights, const void* rows, void* out, std::int64_t num_rows,
                int num_threads) const;
    void attend(std::size_t layer, const TokenRows& rows, const void* qkv, void* query, void* out,
                int num_threads);
    void draw(const DecodeRows& rows, const DrawRule& rule, const Drawn& drawn, int num_threads);

    Room stream_, summed_, branch_, normed_, qkv_, query_, attended_, gate_up_, activated_;
    Room gathered_branch_, gathered_stream_, stats_, lengths_, logits_;
    Room drawn_ids_, drawn_logprobs_, drawn_truncated_, numbers_;
};

}  // namespace fuserl

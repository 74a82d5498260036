// Attention of one new token a row over cached keys and values, on the CPU.
//
// The keys of a row are those of its prompt (stored once for all rows that share it) and then those
// of its slot. They are taken in splits of kSplit keys, counted from the start of the prompt and
// from the start of the slot; each split is worked out by itself and the splits are merged in
// ascending order, the prompt's first. So the bits of a row depend on the row, its keys and the
// instruction set only. Definition: kernels/fuserl_kernels/reference/attention.py.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fuserl {

constexpr std::int64_t kSplit = 256;        // keys
constexpr std::int64_t kAttentionColumns = 256;  // of a head, at most
constexpr std::int64_t kQueryChunk = 16;    // queries that a split is walked for at once
constexpr std::int64_t kRecordHeader = 16;  // floats before the columns of a record: see Record

// Keys and values [items, num_kv_heads, capacity, head_dim] with unit last strides; an item is a
// slot or a prompt.
struct KeyValues {
    const void* keys;
    const void* values;
    std::int64_t num_items;
    std::int64_t capacity;
    std::int64_t key_item_stride, key_head_stride, key_token_stride;  // in elements
    std::int64_t value_item_stride, value_head_stride, value_token_stride;
};

struct DecodeAttention {
    Dtype dtype;
    const void* query;  // [num_rows, num_heads, head_dim], the last stride 1
    std::int64_t num_rows, num_heads, num_kv_heads, head_dim;
    std::int64_t query_row_stride, query_head_stride;  // in elements
    KeyValues slots;
    const std::int64_t* lengths;   // [num_rows]
    const std::int64_t* slot_ids;  // [num_rows], negative for a row that is off; or null
    KeyValues prefixes;
    const std::int64_t* prefix_ids;      // [num_rows], negative for none; or null
    const std::int64_t* prefix_lengths;  // [prefixes.num_items]
    float scale;
    std::int64_t window;  // 0 for none
    float softcap;        // 0 for none
    void* out;            // [num_rows, num_heads, head_dim], contiguous

    std::int64_t group() const { return num_heads / num_kv_heads; }
    std::int64_t slot(std::int64_t row) const { return slot_ids ? slot_ids[row] : row; }
    std::int64_t prefix(std::int64_t row) const { return prefix_ids ? prefix_ids[row] : -1; }
};

// Which keys a row sees: [first, last) of its prompt and of its slot; empty where first >= last.
struct VisibleKeys {
    std::int64_t prefix_first = 0, prefix_last = 0;
    std::int64_t slot_first = 0, slot_last = 0;
};

inline VisibleKeys visible_keys(const DecodeAttention& task, std::int64_t row) {
    VisibleKeys keys;
    if (task.slot(row) < 0) return keys;
    const std::int64_t prefix = task.prefix(row);
    keys.prefix_last = prefix < 0 ? 0 : task.prefix_lengths[prefix];
    keys.slot_last = task.lengths[row];
    const std::int64_t hidden =
        task.window ? keys.prefix_last + keys.slot_last - task.window : std::int64_t{0};
    keys.prefix_first = hidden > 0 ? hidden : 0;
    keys.slot_first = hidden > keys.prefix_last ? hidden - keys.prefix_last : 0;
    return keys;
}

// What is known of one query after some of its keys: the largest score, the sum of the weights
// e^(score - largest), and kRecordHeader floats after the start the weighted sum of the values, in
// the order of the instruction set's vectors.
using Record = float*;

constexpr std::int64_t record_size(std::int64_t head_dim) {
    return kRecordHeader + (head_dim + 15) / 16 * 16;
}

// Rows [first, last) of `rows`, which share a prompt.
struct PrefixUnit {
    std::int64_t prefix, kv_head, first, last;
};

// Room for the queries that a thread works on.
struct AttentionScratch {
    alignas(64) float queries[kQueryChunk * kAttentionColumns];
    alignas(64) float scores[kQueryChunk * kSplit];
    alignas(64) float parts[kQueryChunk * record_size(kAttentionColumns)];
    alignas(64) float states[kQueryChunk * record_size(kAttentionColumns)];
};

// What instruction sets have versions of. `states` are records [num_rows, num_heads] of what the
// prompts gave; those of rows that see none of a prompt are never read.
struct AttentionFunctions {
    // The prompt's keys for the rows of a unit.
    void (*prefix)(const DecodeAttention& task, const PrefixUnit& unit, const std::int64_t* rows,
                   float* states, AttentionScratch& scratch);
    // The slots of the (row, kv head) pairs [first, last), merged and written out.
    void (*slots)(const DecodeAttention& task, std::int64_t first, std::int64_t last,
                  const float* states, AttentionScratch& scratch);
    // One split of a slot into the records `parts` [group] of a (row, kv head) pair.
    void (*split)(const DecodeAttention& task, std::int64_t pair, std::int64_t split, float* parts,
                  AttentionScratch& scratch);
    // The records `parts` [num_splits, group] of a pair, merged and written out.
    void (*merge)(const DecodeAttention& task, std::int64_t pair, const float* states,
                  const float* parts, AttentionScratch& scratch);
};

// Throws std::invalid_argument for lengths, slots or prompts that do not exist.
void decode_attention(const DecodeAttention& task, int num_threads);

}  // namespace fuserl

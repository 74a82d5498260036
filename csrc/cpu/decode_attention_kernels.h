// The loops of decode_attention.h over a struct Simd, for one instruction set.

constexpr std::int64_t kLanes = Simd::kWidth;
constexpr std::int64_t kQueryTile = 4;   // queries whose scores are made at once
constexpr std::int64_t kKeysAhead = 2;
constexpr std::int64_t kValueBlock = 64;  // keys whose values stay in the L1 cache for all queries

// Lanes of a then of b, by number.
#define FUSERL_PICK(...) __builtin_shufflevector(a, b, __VA_ARGS__)

// Neighbouring vectors' lanes added in pairs: four vectors in, one vector out that holds in each
// run of four lanes the sums of those four lanes of each.
FUSERL_INLINE Vector<float, 4>::type fold_lanes(Vector<float, 4>::type a,
                                                Vector<float, 4>::type b) {
    return FUSERL_PICK(0, 4, 1, 5) + FUSERL_PICK(2, 6, 3, 7);
}
FUSERL_INLINE Vector<float, 4>::type fold_pairs(Vector<float, 4>::type a,
                                                Vector<float, 4>::type b) {
    return FUSERL_PICK(0, 1, 4, 5) + FUSERL_PICK(2, 3, 6, 7);
}
FUSERL_INLINE Vector<float, 8>::type fold_lanes(Vector<float, 8>::type a,
                                                Vector<float, 8>::type b) {
    return FUSERL_PICK(0, 8, 1, 9, 4, 12, 5, 13) + FUSERL_PICK(2, 10, 3, 11, 6, 14, 7, 15);
}
FUSERL_INLINE Vector<float, 8>::type fold_pairs(Vector<float, 8>::type a,
                                                Vector<float, 8>::type b) {
    return FUSERL_PICK(0, 1, 8, 9, 4, 5, 12, 13) + FUSERL_PICK(2, 3, 10, 11, 6, 7, 14, 15);
}
FUSERL_INLINE Vector<float, 8>::type fold_fours(Vector<float, 8>::type a,
                                                Vector<float, 8>::type b) {
    return FUSERL_PICK(0, 1, 2, 3, 8, 9, 10, 11) + FUSERL_PICK(4, 5, 6, 7, 12, 13, 14, 15);
}
FUSERL_INLINE Vector<float, 16>::type fold_lanes(Vector<float, 16>::type a,
                                                 Vector<float, 16>::type b) {
    return FUSERL_PICK(0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           FUSERL_PICK(2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}
FUSERL_INLINE Vector<float, 16>::type fold_pairs(Vector<float, 16>::type a,
                                                 Vector<float, 16>::type b) {
    return FUSERL_PICK(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           FUSERL_PICK(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
// Runs of four: the first two of a and of b, and the last two.
FUSERL_INLINE Vector<float, 16>::type fold_fours(Vector<float, 16>::type a,
                                                 Vector<float, 16>::type b) {
    return FUSERL_PICK(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           FUSERL_PICK(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
FUSERL_INLINE Vector<float, 16>::type fold_eights(Vector<float, 16>::type a,
                                                  Vector<float, 16>::type b) {
    return FUSERL_PICK(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           FUSERL_PICK(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#undef FUSERL_PICK

// The sum of the lanes of each of kLanes vectors, each in the same order.
template <typename Lanes>
FUSERL_INLINE Lanes lane_sums(const Lanes* x) {
    Lanes fours[kLanes / 4];
    FUSERL_PRAGMA(GCC unroll 4)
    for (int i = 0; i < kLanes / 4; ++i)
        fours[i] = fold_pairs(fold_lanes(x[4 * i], x[4 * i + 1]),
                              fold_lanes(x[4 * i + 2], x[4 * i + 3]));
    if constexpr (kLanes == 4) {
        return fours[0];
    } else if constexpr (kLanes == 8) {
        return fold_fours(fours[0], fours[1]);
    } else {
        return fold_eights(fold_fours(fours[0], fours[1]), fold_fours(fours[2], fours[3]));
    }
}

// The first `count` columns, 0 in the lanes past them.
template <typename T>
FUSERL_INLINE Floats load_part(const T* source, std::int64_t count) {
    if (count >= kLanes) return Simd::load(source);
    T lanes[kLanes] = {};
    std::memcpy(lanes, source, sizeof(T) * static_cast<std::size_t>(count));
    return Simd::load(lanes);
}

// Columns of a head, rounded up to whole vectors.
FUSERL_INLINE std::int64_t padded_columns(std::int64_t head_dim) {
    return (head_dim + kLanes - 1) / kLanes * kLanes;
}

// Scores of kQueries queries [kQueries, padded] with kLanes / kQueries keys: query by query.
// Columns come in pairs of vectors as load_pair orders them, then in single vectors; the queries
// lie in that order already.
template <int kQueries, typename T>
FUSERL_INLINE Floats tile_scores(const T* const* keys, const float* queries,
                                 std::int64_t head_dim) {
    constexpr int kKeys = kLanes / kQueries;
    const std::int64_t padded = padded_columns(head_dim);
    Floats sums[kLanes] = {};
    std::int64_t column = 0;
    for (; column + 2 * kLanes <= head_dim; column += 2 * kLanes) {
        FUSERL_PRAGMA(GCC unroll 16)
        for (int k = 0; k < kKeys; ++k) {
            Floats key[2];
            Simd::load_pair(keys[k] + column, key);
            FUSERL_PRAGMA(GCC unroll 4)
            for (int q = 0; q < kQueries; ++q) {
                const float* query = queries + q * padded + column;
                sums[q * kKeys + k] += key[0] * Simd::load(query);
                sums[q * kKeys + k] += key[1] * Simd::load(query + kLanes);
            }
        }
    }
    for (; column < head_dim; column += kLanes) {
        FUSERL_PRAGMA(GCC unroll 16)
        for (int k = 0; k < kKeys; ++k) {
            const Floats key = load_part(keys[k] + column, head_dim - column);
            FUSERL_PRAGMA(GCC unroll 4)
            for (int q = 0; q < kQueries; ++q)
                sums[q * kKeys + k] += key * Simd::load(queries + q * padded + column);
        }
    }
    return lane_sums(sums);
}

// The keys [first, last) of one split, counted from its start, and their values.
template <typename T>
struct SplitKeys {
    const T* keys;
    const T* values;
    std::int64_t key_stride, value_stride;
    std::int64_t first, last;
};

// Scores of kQueries queries with kLanes keys from `start` on: scores [kQueries, kSplit].
template <int kQueries, typename T>
FUSERL_INLINE void score_keys(const SplitKeys<T>& split, std::int64_t start, const float* queries,
                              std::int64_t head_dim, float* scores) {
    constexpr int kKeys = kLanes / kQueries;
    for (const std::int64_t stop = start + kLanes; start < stop; start += kKeys) {
        if (start >= split.last) return;
        const T* keys[kKeys];
        FUSERL_PRAGMA(GCC unroll 16)
        for (int k = 0; k < kKeys; ++k) {  // past the end the last key again
            const std::int64_t key = start + k < split.last ? start + k : split.last - 1;
            keys[k] = split.keys + key * split.key_stride;
        }
        float found[kLanes];
        Simd::store(found, tile_scores<kQueries>(keys, queries, head_dim));
        FUSERL_PRAGMA(GCC unroll 4)
        for (int q = 0; q < kQueries; ++q)
            std::memcpy(scores + q * kSplit + start, found + q * kKeys, sizeof(float) * kKeys);
    }
}

// Ask for kLanes rows of `rows` from `start` on, as far as the split goes.
template <int kLocality, typename T>
FUSERL_INLINE void prefetch_rows(const T* rows, std::int64_t stride, std::int64_t start,
                                 std::int64_t last, std::int64_t head_dim) {
    const std::int64_t num_bytes = head_dim * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t stop = start + kLanes < last ? start + kLanes : last;
    for (std::int64_t key = start; key < stop; ++key) {
        const char* row = reinterpret_cast<const char*>(rows + key * stride);
        for (std::int64_t byte = 0; byte < num_bytes; byte += 64)
            __builtin_prefetch(row + byte, 0, kLocality);
    }
}

// Scores of all queries, kLanes keys at a time, so that keys are read from memory once. Begins at a
// multiple of kLanes, so that no tile crosses the end of a row of scores. A tile of three queries
// has room for a fourth, whose scores are nobody's.
template <typename T>
FUSERL_INLINE void all_scores(const SplitKeys<T>& split, std::int64_t num_queries,
                              const float* queries, std::int64_t head_dim, float* scores) {
    const std::int64_t padded = padded_columns(head_dim);
    for (std::int64_t key = split.first / kLanes * kLanes; key < split.last; key += kLanes) {
        prefetch_rows<3>(split.keys, split.key_stride, key + kKeysAhead * kLanes, split.last,
                         head_dim);
        prefetch_rows<2>(split.values, split.value_stride, key, split.last, head_dim);
        std::int64_t q = 0;
        for (; q + 2 < num_queries; q += kQueryTile)
            score_keys<kQueryTile>(split, key, queries + q * padded, head_dim,
                                   scores + q * kSplit);
        if (q + 2 == num_queries)
            score_keys<2>(split, key, queries + q * padded, head_dim, scores + q * kSplit);
        else if (q + 1 == num_queries)
            score_keys<1>(split, key, queries + q * padded, head_dim, scores + q * kSplit);
    }
}

// Scores [kSplit] of one query, of which it sees [first, last), into weights e^(score - largest);
// [begin, end) are the whole vectors around, whose other lanes become 0.
template <typename Cap>
FUSERL_INLINE void weigh(float* scores, std::int64_t begin, std::int64_t end, std::int64_t first,
                         std::int64_t last, const Cap& cap, Record record) {
    const Simd::Scale unit(1.0);
    if constexpr (!std::is_same_v<Cap, NoCap>)
        for (std::int64_t key = begin; key < end; key += kLanes)
            Simd::store(scores + key, cap(Simd::load(scores + key)));
    for (std::int64_t key = begin; key < first; ++key) scores[key] = -kInfinity;
    for (std::int64_t key = last; key < end; ++key) scores[key] = -kInfinity;
    Floats maxima = Simd::splat(-kLargest);  // finite: a split may have scores of -inf only
    for (std::int64_t key = begin; key < end; key += kLanes)
        maxima = Simd::grown(maxima, Simd::load(scores + key));
    const float maximum = Simd::lane_maximum(maxima);
    Floats sums{};
    for (std::int64_t key = begin; key < end; key += kLanes) {
        const Floats x = Simd::load(scores + key) - maximum;
        const Floats weight = Simd::weight(Simd::at_least(x, Simd::splat(unit.floor)), unit);
        Simd::store(scores + key, weight);
        sums += weight;
    }
    record[0] = maximum;
    record[1] = static_cast<float>(Simd::lane_sum(sums));
}

// Adds the weighted values of the keys [first, last) to kQueries records, at kVectors vectors of
// columns: pairs as load_pair orders them, or one vector of `count` columns.
template <int kQueries, int kVectors, typename T>
FUSERL_INLINE void add_values(const SplitKeys<T>& split, std::int64_t first, std::int64_t last,
                              std::int64_t column, std::int64_t count, const float* weights,
                              float* records, std::int64_t record) {
    Floats sums[kQueries][kVectors];
    float* target = records + kRecordHeader + column;
    FUSERL_PRAGMA(GCC unroll 4)
    for (int q = 0; q < kQueries; ++q)
        FUSERL_PRAGMA(GCC unroll 8)
        for (int v = 0; v < kVectors; ++v)
            sums[q][v] = Simd::load(target + q * record + v * kLanes);
    for (std::int64_t key = first; key < last; ++key) {
        const T* source = split.values + key * split.value_stride + column;
        Floats values[kVectors];
        if constexpr (kVectors == 1) {
            values[0] = load_part(source, count);
        } else {
            FUSERL_PRAGMA(GCC unroll 4)
            for (int v = 0; v < kVectors; v += 2) {
                Floats pair[2];
                Simd::load_pair(source + v * kLanes, pair);
                values[v] = pair[0];
                values[v + 1] = pair[1];
            }
        }
        FUSERL_PRAGMA(GCC unroll 4)
        for (int q = 0; q < kQueries; ++q) {
            const Floats weight = Simd::splat(weights[q * kSplit + key]);
            FUSERL_PRAGMA(GCC unroll 8)
            for (int v = 0; v < kVectors; ++v) sums[q][v] += weight * values[v];
        }
    }
    FUSERL_PRAGMA(GCC unroll 4)
    for (int q = 0; q < kQueries; ++q)
        FUSERL_PRAGMA(GCC unroll 8)
        for (int v = 0; v < kVectors; ++v)
            Simd::store(target + q * record + v * kLanes, sums[q][v]);
}

// All columns.
template <int kQueries, typename T>
FUSERL_INLINE void add_values(const SplitKeys<T>& split, std::int64_t first, std::int64_t last,
                              std::int64_t head_dim, const float* weights, float* records,
                              std::int64_t record) {
    std::int64_t column = 0;
    for (; column + 4 * kLanes <= head_dim; column += 4 * kLanes)
        add_values<kQueries, 4>(split, first, last, column, 0, weights, records, record);
    if (column + 2 * kLanes <= head_dim) {
        add_values<kQueries, 2>(split, first, last, column, 0, weights, records, record);
        column += 2 * kLanes;
    }
    for (; column < head_dim; column += kLanes)
        add_values<kQueries, 1>(split, first, last, column, head_dim - column, weights, records,
                                record);
}

// Records [num_queries] of one split. Query q sees the keys [firsts[q], split.last) of it.
template <typename T, typename Cap>
void attend(const DecodeAttention& task, const SplitKeys<T>& split, std::int64_t num_queries,
            const std::int64_t* firsts, const Cap& cap, float* records,
            AttentionScratch& scratch) {
    const std::int64_t head_dim = task.head_dim, record = record_size(head_dim);
    all_scores(split, num_queries, scratch.queries, head_dim, scratch.scores);
    const std::int64_t begin = split.first / kLanes * kLanes;
    const std::int64_t end = (split.last + kLanes - 1) / kLanes * kLanes;
    for (std::int64_t q = 0; q < num_queries; ++q) {
        Record mine = records + q * record;
        weigh(scratch.scores + q * kSplit, begin, end, firsts[q], split.last, cap, mine);
        std::memset(mine + kRecordHeader, 0,
                    sizeof(float) * static_cast<std::size_t>(record - kRecordHeader));
    }
    for (std::int64_t start = split.first; start < split.last; start += kValueBlock) {
        const std::int64_t stop = start + kValueBlock < split.last ? start + kValueBlock
                                                                   : split.last;
        // Queries that start at the same key go together; a key that one of them does not see
        // would reach it as 0 times its value, which is no 0 where the value is not finite.
        for (std::int64_t q = 0; q < num_queries;) {
            std::int64_t same = 1;
            while (same < kQueryTile && q + same < num_queries && firsts[q + same] == firsts[q])
                ++same;
            const std::int64_t first = start < firsts[q] ? firsts[q] : start;
            const float* weights = scratch.scores + q * kSplit;
            Record target = records + q * record;
            if (same == kQueryTile) {
                add_values<kQueryTile>(split, first, stop, head_dim, weights, target, record);
            } else if (same == 3) {
                add_values<3>(split, first, stop, head_dim, weights, target, record);
            } else if (same == 2) {
                add_values<2>(split, first, stop, head_dim, weights, target, record);
            } else {
                add_values<1>(split, first, stop, head_dim, weights, target, record);
            }
            q += same;
        }
    }
}

void clear(Record state, std::int64_t head_dim) {
    std::memset(state, 0, sizeof(float) * static_cast<std::size_t>(record_size(head_dim)));
    state[0] = -kInfinity;
}

// Merges the record of the next split into the state of those before it.
void fold(Record state, const float* part, std::int64_t head_dim) {
    const float maximum = state[0] > part[0] ? state[0] : part[0];
    const float keep = std::exp(state[0] - maximum), take = std::exp(part[0] - maximum);
    state[0] = maximum;
    state[1] = state[1] * keep + part[1] * take;
    for (std::int64_t column = 0; column < head_dim; column += kLanes) {
        float* target = state + kRecordHeader + column;
        const Floats more = Simd::load(part + kRecordHeader + column);
        Simd::store(target, Simd::load(target) * keep + more * take);
    }
}

// Queries [num_queries, padded] times scale, in the order in which keys are loaded.
template <typename T>
void load_queries(const DecodeAttention& task, std::int64_t row, std::int64_t head,
                  std::int64_t num_heads, float* target) {
    const std::int64_t head_dim = task.head_dim, padded = padded_columns(head_dim);
    for (std::int64_t i = 0; i < num_heads; ++i, target += padded) {
        const T* source = static_cast<const T*>(task.query) + row * task.query_row_stride +
                          (head + i) * task.query_head_stride;
        std::int64_t column = 0;
        for (; column + 2 * kLanes <= head_dim; column += 2 * kLanes) {
            Floats pair[2];
            Simd::load_pair(source + column, pair);
            Simd::store(target + column, pair[0] * task.scale);
            Simd::store(target + column + kLanes, pair[1] * task.scale);
        }
        for (; column < head_dim; column += kLanes)
            Simd::store(target + column,
                        load_part(source + column, head_dim - column) * task.scale);
    }
}

// What a query came to; zeros where it saw no key.
template <typename T>
void finish(const DecodeAttention& task, std::int64_t row, std::int64_t head,
            const float* state) {
    const std::int64_t head_dim = task.head_dim;
    T* target = static_cast<T*>(task.out) + (row * task.num_heads + head) * head_dim;
    const float* source = state + kRecordHeader;
    const float divisor = state[0] == -kInfinity ? 1.0f : state[1];
    std::int64_t column = 0;
    for (; column + 2 * kLanes <= head_dim; column += 2 * kLanes) {
        const Floats pair[2] = {Simd::load(source + column) / divisor,
                                Simd::load(source + column + kLanes) / divisor};
        Simd::store_pair(target + column, pair);
    }
    for (; column < head_dim; column += kLanes)
        Simd::store_some(target + column, Simd::load(source + column) / divisor,
                         head_dim - column);
}

// The part of a split that lies in [first, last) of an item's keys.
template <typename T>
FUSERL_INLINE SplitKeys<T> split_keys(const KeyValues& cache, std::int64_t item,
                                      std::int64_t kv_head, std::int64_t split, std::int64_t first,
                                      std::int64_t last) {
    const std::int64_t start = split * kSplit;
    return {static_cast<const T*>(cache.keys) + item * cache.key_item_stride +
                kv_head * cache.key_head_stride + start * cache.key_token_stride,
            static_cast<const T*>(cache.values) + item * cache.value_item_stride +
                kv_head * cache.value_head_stride + start * cache.value_token_stride,
            cache.key_token_stride,
            cache.value_token_stride,
            first > start ? first - start : 0,
            last - start < kSplit ? last - start : kSplit};
}

template <typename T, typename Cap>
void prefix_unit(const DecodeAttention& task, const PrefixUnit& unit, const std::int64_t* rows,
                 float* states, AttentionScratch& scratch) {
    const Cap cap(task.softcap);
    const std::int64_t head_dim = task.head_dim, record = record_size(head_dim);
    const std::int64_t group = task.group(), head = unit.kv_head * group;
    const std::int64_t last = task.prefix_lengths[unit.prefix];
    const auto state = [&](std::int64_t row, std::int64_t i) {
        return states + (row * task.num_heads + head + i) * record;
    };
    for (std::int64_t begin = 0; begin < group; begin += kQueryChunk) {
        const std::int64_t heads = group - begin < kQueryChunk ? group - begin : kQueryChunk;
        std::int64_t earliest = last;
        for (std::int64_t i = unit.first; i < unit.last; ++i) {
            const std::int64_t first = visible_keys(task, rows[i]).prefix_first;
            earliest = first < earliest ? first : earliest;
            load_queries<T>(task, rows[i], head + begin, heads,
                            scratch.queries +
                                (i - unit.first) * heads * padded_columns(head_dim));
            for (std::int64_t h = 0; h < heads; ++h) clear(state(rows[i], begin + h), head_dim);
        }
        const std::int64_t num_queries = (unit.last - unit.first) * heads;
        for (std::int64_t s = earliest / kSplit; s * kSplit < last; ++s) {
            const auto split =
                split_keys<T>(task.prefixes, unit.prefix, unit.kv_head, s, earliest, last);
            std::int64_t firsts[kQueryChunk];
            for (std::int64_t q = 0; q < num_queries; ++q) {
                const std::int64_t row = rows[unit.first + q / heads];
                const std::int64_t first = visible_keys(task, row).prefix_first - s * kSplit;
                firsts[q] = first < 0 ? 0 : first < split.last ? first : split.last;
            }
            attend(task, split, num_queries, firsts, cap, scratch.parts, scratch);
            for (std::int64_t q = 0; q < num_queries; ++q)
                if (firsts[q] < split.last)
                    fold(state(rows[unit.first + q / heads], begin + q % heads),
                         scratch.parts + q * record, head_dim);
        }
    }
}

// The state of a query before its slot: what its prompt gave, if it sees any of it.
FUSERL_INLINE void begin_state(const DecodeAttention& task, std::int64_t row, std::int64_t head,
                               const VisibleKeys& keys, const float* states, Record state) {
    const std::int64_t record = record_size(task.head_dim);
    if (keys.prefix_first < keys.prefix_last)
        std::memcpy(state, states + (row * task.num_heads + head) * record,
                    sizeof(float) * static_cast<std::size_t>(record));
    else
        clear(state, task.head_dim);
}

// Records [heads] of a split of a slot, for queries that are loaded.
template <typename T, typename Cap>
FUSERL_INLINE void slot_split(const DecodeAttention& task, std::int64_t row, std::int64_t kv_head,
                              const VisibleKeys& keys, std::int64_t s, std::int64_t heads,
                              const Cap& cap, float* parts, AttentionScratch& scratch) {
    const auto split =
        split_keys<T>(task.slots, task.slot(row), kv_head, s, keys.slot_first, keys.slot_last);
    std::int64_t firsts[kQueryChunk];
    for (std::int64_t q = 0; q < heads; ++q) firsts[q] = split.first;
    attend(task, split, heads, firsts, cap, parts, scratch);
}

// Ask for the first keys of a (row, kv head) pair and their values: the processor's own prefetch
// knows nothing of the next pair's memory before it is read.
template <typename T>
FUSERL_INLINE void prefetch_pair_of(const DecodeAttention& task, std::int64_t pair) {
    const std::int64_t row = pair / task.num_kv_heads, kv_head = pair % task.num_kv_heads;
    const VisibleKeys keys = visible_keys(task, row);
    if (keys.slot_first >= keys.slot_last) return;
    const auto split = split_keys<T>(task.slots, task.slot(row), kv_head, keys.slot_first / kSplit,
                                     keys.slot_first, keys.slot_last);
    for (std::int64_t key = split.first; key < split.first + kKeysAhead * kLanes; key += kLanes) {
        prefetch_rows<2>(split.keys, split.key_stride, key, split.last, task.head_dim);
        prefetch_rows<2>(split.values, split.value_stride, key, split.last, task.head_dim);
    }
}

template <typename T, typename Cap>
void slot_pairs(const DecodeAttention& task, std::int64_t first, std::int64_t last,
                const float* states, AttentionScratch& scratch) {
    const Cap cap(task.softcap);
    const std::int64_t record = record_size(task.head_dim), group = task.group();
    for (std::int64_t pair = first; pair < last; ++pair) {
        const std::int64_t row = pair / task.num_kv_heads, kv_head = pair % task.num_kv_heads;
        const VisibleKeys keys = visible_keys(task, row);
        if (pair + 1 < last) prefetch_pair_of<T>(task, pair + 1);
        for (std::int64_t begin = 0; begin < group; begin += kQueryChunk) {
            const std::int64_t heads = group - begin < kQueryChunk ? group - begin : kQueryChunk;
            const std::int64_t head = kv_head * group + begin;
            for (std::int64_t q = 0; q < heads; ++q)
                begin_state(task, row, head + q, keys, states, scratch.states + q * record);
            if (keys.slot_first < keys.slot_last)
                load_queries<T>(task, row, head, heads, scratch.queries);
            for (std::int64_t s = keys.slot_first / kSplit; s * kSplit < keys.slot_last; ++s) {
                slot_split<T>(task, row, kv_head, keys, s, heads, cap, scratch.parts, scratch);
                for (std::int64_t q = 0; q < heads; ++q)
                    fold(scratch.states + q * record, scratch.parts + q * record, task.head_dim);
            }
            for (std::int64_t q = 0; q < heads; ++q)
                finish<T>(task, row, head + q, scratch.states + q * record);
        }
    }
}

FUSERL_INLINE bool sees_split(const VisibleKeys& keys, std::int64_t s) {
    return s >= keys.slot_first / kSplit && s * kSplit < keys.slot_last;
}

template <typename T, typename Cap>
void one_split(const DecodeAttention& task, std::int64_t pair, std::int64_t s, float* parts,
               AttentionScratch& scratch) {
    const std::int64_t row = pair / task.num_kv_heads, kv_head = pair % task.num_kv_heads;
    const VisibleKeys keys = visible_keys(task, row);
    if (!sees_split(keys, s)) return;
    const Cap cap(task.softcap);
    const std::int64_t group = task.group();
    for (std::int64_t begin = 0; begin < group; begin += kQueryChunk) {
        const std::int64_t heads = group - begin < kQueryChunk ? group - begin : kQueryChunk;
        load_queries<T>(task, row, kv_head * group + begin, heads, scratch.queries);
        slot_split<T>(task, row, kv_head, keys, s, heads, cap,
                      parts + begin * record_size(task.head_dim), scratch);
    }
}

template <typename T>
void merge_pair(const DecodeAttention& task, std::int64_t pair, const float* states,
                const float* parts, AttentionScratch& scratch) {
    const std::int64_t row = pair / task.num_kv_heads, group = task.group();
    const std::int64_t record = record_size(task.head_dim);
    const VisibleKeys keys = visible_keys(task, row);
    for (std::int64_t i = 0; i < group; ++i) {
        const std::int64_t head = pair % task.num_kv_heads * group + i;
        begin_state(task, row, head, keys, states, scratch.states);
        for (std::int64_t s = keys.slot_first / kSplit; s * kSplit < keys.slot_last; ++s)
            fold(scratch.states, parts + (s * group + i) * record, task.head_dim);
        finish<T>(task, row, head, scratch.states);
    }
}

// Calls visit with an element of the task's dtype.
template <typename Visit>
FUSERL_INLINE void with_dtype(const DecodeAttention& task, const Visit& visit) {
    [[maybe_unused]] const FlushSubnormals flush;
    switch (task.dtype) {
        case Dtype::kFloat32: return visit(float{});
        case Dtype::kBFloat16: return visit(BFloat16{});
        case Dtype::kFloat16: return visit(Float16{});
    }
}

void attention_prefix(const DecodeAttention& task, const PrefixUnit& unit,
                      const std::int64_t* rows, float* states, AttentionScratch& scratch) {
    with_dtype(task, [&](auto element) {
        using T = decltype(element);
        if (task.softcap == 0.0f)
            prefix_unit<T, NoCap>(task, unit, rows, states, scratch);
        else
            prefix_unit<T, TanhCap>(task, unit, rows, states, scratch);
    });
}

void attention_slots(const DecodeAttention& task, std::int64_t first, std::int64_t last,
                     const float* states, AttentionScratch& scratch) {
    with_dtype(task, [&](auto element) {
        using T = decltype(element);
        if (task.softcap == 0.0f)
            slot_pairs<T, NoCap>(task, first, last, states, scratch);
        else
            slot_pairs<T, TanhCap>(task, first, last, states, scratch);
    });
}

void attention_split(const DecodeAttention& task, std::int64_t pair, std::int64_t s, float* parts,
                     AttentionScratch& scratch) {
    with_dtype(task, [&](auto element) {
        using T = decltype(element);
        if (task.softcap == 0.0f)
            one_split<T, NoCap>(task, pair, s, parts, scratch);
        else
            one_split<T, TanhCap>(task, pair, s, parts, scratch);
    });
}

void attention_merge(const DecodeAttention& task, std::int64_t pair, const float* states,
                     const float* parts, AttentionScratch& scratch) {
    with_dtype(task, [&](auto element) {
        merge_pair<decltype(element)>(task, pair, states, parts, scratch);
    });
}

constexpr AttentionFunctions attention_functions{attention_prefix, attention_slots, attention_split,
                                                 attention_merge};

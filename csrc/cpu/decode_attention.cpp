#include "decode_attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel_functions.h"
#include "parallel.h"

namespace fuserl {
namespace {

void require(bool holds, const char* name, std::int64_t found, std::int64_t bound) {
    if (!holds)
        throw std::invalid_argument(std::string(name) + " must be at most " +
                                    std::to_string(bound) + " and not negative where in use, found " +
                                    std::to_string(found));
}

void check(const DecodeAttention& task) {
    for (std::int64_t row = 0; row < task.num_rows; ++row) {
        const std::int64_t slot = task.slot(row), prefix = task.prefix(row);
        if (slot < 0) continue;
        require(slot < task.slots.num_items, "slots", slot, task.slots.num_items - 1);
        const std::int64_t length = task.lengths[row];
        require(0 <= length && length <= task.slots.capacity, "lengths", length,
                task.slots.capacity);
        if (prefix < 0) continue;
        require(prefix < task.prefixes.num_items, "prefix_ids", prefix,
                task.prefixes.num_items - 1);
        const std::int64_t shared = task.prefix_lengths[prefix];
        require(0 <= shared && shared <= task.prefixes.capacity, "prefix_lengths", shared,
                task.prefixes.capacity);
    }
}

AttentionScratch& thread_scratch() {
    thread_local AttentionScratch scratch;
    return scratch;
}

// Room that is kept from call to call.
float* grown(std::vector<float>& room, std::int64_t size) {
    if (static_cast<std::int64_t>(room.size()) < size) room.resize(static_cast<std::size_t>(size));
    return room.data();
}

// The rows that see some of a prompt, those of each prompt together and in ascending order, and
// runs of them that one walk over the prompt's keys serves.
struct PrefixPlan {
    std::vector<std::int64_t> rows;
    std::vector<PrefixUnit> units;
    std::int64_t num_keys = 0;  // of all units

    explicit PrefixPlan(const DecodeAttention& task) {
        for (std::int64_t row = 0; row < task.num_rows; ++row) {
            const VisibleKeys keys = visible_keys(task, row);
            if (keys.prefix_first < keys.prefix_last) rows.push_back(row);
        }
        std::stable_sort(rows.begin(), rows.end(), [&](std::int64_t a, std::int64_t b) {
            return task.prefix_ids[a] < task.prefix_ids[b];
        });
        const auto count = static_cast<std::int64_t>(rows.size());
        const std::int64_t most = std::max<std::int64_t>(1, kQueryChunk / task.group());
        for (std::int64_t first = 0, last = 0; first < count; first = last) {
            const std::int64_t prefix = task.prefix_ids[rows[first]];
            while (last < count && task.prefix_ids[rows[last]] == prefix) ++last;
            for (std::int64_t head = 0; head < task.num_kv_heads; ++head)
                for (std::int64_t start = first; start < last; start += most) {
                    units.push_back({prefix, head, start, std::min(start + most, last)});
                    num_keys += task.prefix_lengths[prefix];
                }
        }
    }
};

}  // namespace

void decode_attention(const DecodeAttention& task, int num_threads) {
    check(task);
    const AttentionFunctions& functions = kernel_functions().attention;
    const std::int64_t record = record_size(task.head_dim), group = task.group();
    const std::int64_t num_pairs = task.num_rows * task.num_kv_heads;
    const std::int64_t key_work = 2 * task.head_dim;  // elements of a key and its value
    if (num_pairs == 0) return;

    thread_local std::vector<float> state_room, part_room;
    float* states = nullptr;
    if (task.prefix_ids) {
        const PrefixPlan plan(task);
        states = grown(state_room, task.num_rows * task.num_heads * record);
        const auto num_units = static_cast<std::int64_t>(plan.units.size());
        const std::int64_t work = plan.num_keys / std::max<std::int64_t>(1, num_units) * key_work;
        parallel_rows(num_units, std::max<std::int64_t>(1, work), num_threads,
                      [&](std::int64_t first, std::int64_t last) {
                          for (std::int64_t i = first; i < last; ++i)
                              functions.prefix(task, plan.units[i], plan.rows.data(), states,
                                               thread_scratch());
                      });
    }

    std::int64_t num_keys = 0, longest = 0;
    for (std::int64_t row = 0; row < task.num_rows; ++row) {
        const VisibleKeys keys = visible_keys(task, row);
        num_keys += keys.slot_last - keys.slot_first;
        longest = std::max(longest, keys.slot_last);
    }
    const std::int64_t num_splits = (longest + kSplit - 1) / kSplit;
    const std::int64_t pair_work = (num_keys / task.num_rows + 1) * key_work;
    // Enough pairs keep all threads busy to the end; a few long ones are shared out by splits.
    if (num_threads == 1 || num_splits <= 1 || num_pairs >= 4 * num_threads) {
        parallel_rows(num_pairs, pair_work, num_threads,
                      [&](std::int64_t first, std::int64_t last) {
                          functions.slots(task, first, last, states, thread_scratch());
                      });
        return;
    }
    float* parts = grown(part_room, num_pairs * num_splits * group * record);
    parallel_rows(num_pairs * num_splits, pair_work / num_splits + 1, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      for (std::int64_t i = first; i < last; ++i)
                          functions.split(task, i / num_splits, i % num_splits,
                                          parts + i * group * record, thread_scratch());
                  });
    for (std::int64_t pair = 0; pair < num_pairs; ++pair)
        functions.merge(task, pair, states, parts + pair * num_splits * group * record,
                        thread_scratch());
}

}  // namespace fuserl

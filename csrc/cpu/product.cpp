#include "product.h"

#include <algorithm>
#include <cstring>

#include "instruction_set.h"
#include "kernel_functions.h"
#include "large_pages.h"
#include "parallel.h"

namespace fuserl {
namespace {

constexpr std::int64_t kRowBlock = 128;     // rows whose inputs stay in a cache for all panels
constexpr std::int64_t kMinWork = 1 << 16;  // multiply-adds that pay for a second thread
constexpr std::int64_t kAlone = 1 << 19;    // a unit of parallel_rows that is dealt out by itself

const ProductFunctions& functions_for(Dtype dtype) {
#ifdef FUSERL_X86
    static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
    if (dtype == Dtype::kBFloat16 && has_bf16 && &kernel_functions() == &avx512_functions)
        return avx512_bf16_products;
#else
    (void)dtype;
#endif
    return kernel_functions().products;
}

// The words of one panel, from rows of `words` whole words and perhaps half of one more.
void pack_panel(const char* weight, std::int64_t row_bytes, std::int64_t num_rows,
                std::int64_t words, bool has_half, std::uint32_t* panel) {
    constexpr std::int64_t kTile = 16;
    if (num_rows < kPanel || has_half)
        std::memset(panel, 0, static_cast<std::size_t>((words + has_half) * kPanel) * 4);
    for (std::int64_t first = 0; first < words; first += kTile) {
        const std::int64_t count = std::min(kTile, words - first);
        std::uint32_t tile[kPanel][kTile];
        for (std::int64_t r = 0; r < num_rows; ++r)
            std::memcpy(tile[r], weight + r * row_bytes + first * 4,
                        static_cast<std::size_t>(count) * 4);
        std::uint32_t* target = panel + first * kPanel;
        if (count == kTile && num_rows == kPanel) {  // sizes that the compiler knows
            for (std::int64_t k = 0; k < kTile; ++k)
                for (std::int64_t r = 0; r < kPanel; ++r) target[k * kPanel + r] = tile[r][k];
        } else {
            for (std::int64_t k = 0; k < count; ++k)
                for (std::int64_t r = 0; r < num_rows; ++r) target[k * kPanel + r] = tile[r][k];
        }
    }
    if (!has_half) return;
    for (std::int64_t r = 0; r < num_rows; ++r) {
        std::uint16_t half;
        std::memcpy(&half, weight + r * row_bytes + words * 4, sizeof half);
        panel[words * kPanel + r] = half;
    }
}

// The same of a weight whose columns are contiguous: each input's outputs lie together already.
template <typename T>
void pack_panel_of_columns(const T* weight, std::int64_t column_stride, std::int64_t num_rows,
                           std::int64_t num_inputs, T* panel) {
    constexpr std::int64_t kPerWord = 4 / sizeof(T);
    if (num_rows < kPanel || num_inputs % kPerWord != 0)
        std::memset(panel, 0, static_cast<std::size_t>((num_inputs + kPerWord - 1) / kPerWord *
                                                       kPerWord * kPanel) * sizeof(T));
    const auto put = [&](std::int64_t count) {
        for (std::int64_t k = 0; k < num_inputs; ++k) {
            const T* source = weight + k * column_stride;
            T* target = panel + k / kPerWord * kPanel * kPerWord + k % kPerWord;
            for (std::int64_t r = 0; r < count; ++r) target[r * kPerWord] = source[r];
        }
    };
    if (num_rows == kPanel)
        put(kPanel);  // a size that the compiler knows
    else
        put(num_rows);
}

}  // namespace

void pack_weight(const PackedWeight& packed, const void* weight, std::int64_t row_stride,
                 std::int64_t column_stride, int num_threads) {
    const bool is_wide = packed.dtype == Dtype::kFloat32;
    const std::int64_t words = is_wide ? packed.num_inputs : packed.num_inputs / 2;
    const bool has_half = !is_wide && packed.num_inputs % 2 != 0;
    const std::int64_t row_bytes = row_stride * size_of(packed.dtype);
    auto* panels = static_cast<std::uint32_t*>(const_cast<void*>(packed.panels));
    advise_large_pages(panels, packed.num_bytes());
    const std::int64_t panel_words = packed.panel_rows() * kPanel;
    parallel_rows(packed.num_panels(), panel_words, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      for (std::int64_t p = first; p < last; ++p) {
                          const char* source =
                              static_cast<const char*>(weight) + p * kPanel * row_bytes;
                          std::uint32_t* panel = panels + p * panel_words;
                          const std::int64_t rows =
                              std::min(kPanel, packed.num_outputs - p * kPanel);
                          if (column_stride == 1)
                              pack_panel(source, row_bytes, rows, words, has_half, panel);
                          else if (is_wide)
                              pack_panel_of_columns(reinterpret_cast<const std::uint32_t*>(source),
                                                    column_stride, rows, packed.num_inputs, panel);
                          else
                              pack_panel_of_columns(reinterpret_cast<const std::uint16_t*>(source),
                                                    column_stride, rows, packed.num_inputs,
                                                    reinterpret_cast<std::uint16_t*>(panel));
                      }
                  });
}

void product(const Product& task, int num_threads) {
    const ProductFunctions& functions = functions_for(task.weight.dtype);
    const std::int64_t num_panels = task.weight.num_panels();
    if (task.num_rows == 0 || num_panels == 0) return;
    const std::int64_t row_work = task.weight.num_outputs * task.weight.num_inputs;
    if (num_threads == 1 || task.num_rows * row_work < kMinWork) {
        for (std::int64_t row = 0; row < task.num_rows; row += kRowBlock)
            functions.multiply(task, row, std::min(row + kRowBlock, task.num_rows), 0, num_panels);
        return;
    }
    // Units of a few tiles' panels each, dealt out one by one; fewer where that evens out shares.
    const std::int64_t num_blocks = (task.num_rows + kRowBlock - 1) / kRowBlock;
    const std::int64_t wanted = std::max<std::int64_t>(1, num_panels * num_blocks / (8 * num_threads));
    const std::int64_t tiles = std::max<std::int64_t>(1, wanted / functions.tile_panels);
    const std::int64_t unit = std::min(tiles, std::int64_t{8}) * functions.tile_panels;
    const std::int64_t units = (num_panels + unit - 1) / unit;
    parallel_rows(units * num_blocks, kAlone, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      for (std::int64_t i = first; i < last; ++i) {
                          const std::int64_t row = i / units * kRowBlock;
                          const std::int64_t panel = i % units * unit;
                          functions.multiply(task, row, std::min(row + kRowBlock, task.num_rows),
                                             panel, std::min(panel + unit, num_panels));
                      }
                  });
}

}  // namespace fuserl

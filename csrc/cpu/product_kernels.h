// The loops of product.h over a struct Simd: a tile of rows and outputs stays in registers while
// its inputs are walked.

namespace products {

constexpr int kLanesOf = static_cast<int>(Simd::kWidth);
constexpr int kPanelVectors = static_cast<int>(kPanel) / kLanesOf;
// As many as the registers hold, with room for a row's element and the weight's vectors.
constexpr int kTilePanels = kLanesOf == 16 ? 3 : 1;
constexpr int kTileRows = kLanesOf == 16 ? 8 : kLanesOf == 8 ? 5 : 2;
constexpr int kTileVectors = kTilePanels * kPanelVectors;

// How a step of the walk multiplies: an input of float32, or two of a narrower dtype.
template <typename T>
struct Step {
    static constexpr int kInputs = 2;

    // The row's two elements, and the products of both with a vector of pairs.
    using Element = std::uint32_t;
    static FUSERL_INLINE Element element(const T* source) {
        Element pair;
        std::memcpy(&pair, source, sizeof pair);
        return pair;
    }
    static FUSERL_INLINE Element last_element(const T* source) { return source->bits; }
#ifdef FUSERL_DOT_BF16
    static FUSERL_INLINE Floats multiply(Floats sum, Element pair, const std::uint32_t* weights) {
        static_assert(std::is_same_v<T, BFloat16>);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)),
                                (__m512bh)_mm512_loadu_si512(weights));
    }
#else
    static FUSERL_INLINE Floats multiply(Floats sum, Element pair, const std::uint32_t* weights) {
        typename Simd::Words words;
        std::memcpy(&words, weights, sizeof words);
        const typename Simd::Words both = typename Simd::Words{} + pair;
        sum = Simd::multiply_add(low(both), low(words), sum);
        return Simd::multiply_add(high(both), high(words), sum);
    }
    static FUSERL_INLINE Floats low(typename Simd::Words pairs) {
        return Simd::widen(__builtin_convertvector(pairs & 0xffffu, typename Simd::Halves), T{});
    }
    static FUSERL_INLINE Floats high(typename Simd::Words pairs) {
        return Simd::widen(__builtin_convertvector(pairs >> 16, typename Simd::Halves), T{});
    }
#endif
};

#ifndef FUSERL_DOT_BF16
template <>
struct Step<float> {
    static constexpr int kInputs = 1;

    using Element = float;
    static FUSERL_INLINE Element element(const float* source) { return *source; }
    static FUSERL_INLINE Element last_element(const float* source) { return *source; }
    static FUSERL_INLINE Floats multiply(Floats sum, Element x, const std::uint32_t* weights) {
        Floats vector;
        std::memcpy(&vector, weights, sizeof vector);
        return Simd::multiply_add(Simd::splat(x), vector, sum);
    }
};
#endif

// Steps [first, last) of kRows rows and kVectors vectors of outputs.
template <typename T, int kRows, int kVectors>
FUSERL_INLINE void walk(const Product& task, const T* rows, const std::uint32_t* const* panels,
                        const std::uint32_t* ahead, std::int64_t first, std::int64_t last,
                        bool is_cut, Floats (&sums)[kRows][kVectors]) {
    using S = Step<T>;
    FUSERL_PRAGMA(GCC unroll 8)
    for (int r = 0; r < kRows; ++r) {
        FUSERL_PRAGMA(GCC unroll 8)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Floats{};
    }
    const std::int64_t row_stride = task.row_stride;
    const std::int64_t step_stride = S::kInputs == 2 ? 2 : task.input_stride;
    const auto add = [&](std::int64_t step, const T* source, const auto& element) FUSERL_LAMBDA {
        FUSERL_PRAGMA(GCC unroll 8)
        for (int r = 0; r < kRows; ++r) {
            const typename S::Element x = element(source + r * row_stride);
            FUSERL_PRAGMA(GCC unroll 8)
            for (int v = 0; v < kVectors; ++v)
                sums[r][v] = S::multiply(
                    sums[r][v], x,
                    panels[v / kPanelVectors] + step * kPanel + v % kPanelVectors * kLanesOf);
        }
    };
    const std::int64_t whole = is_cut ? last - 1 : last;
    const T* source = rows + first * step_stride;
    for (std::int64_t step = first; step < whole; ++step, source += step_stride) {
        __builtin_prefetch(ahead + step * kPanel, 0, 2);
        add(step, source, [](const T* at) FUSERL_LAMBDA { return S::element(at); });
    }
    if (is_cut)  // an odd number of inputs: the last pair is half of one
        add(whole, source, [](const T* at) FUSERL_LAMBDA { return S::last_element(at); });
}

// A part of the walk, and which panel to ask for meanwhile.
struct Part {
    std::int64_t first, last;  // steps; first at a multiple of a chain
    std::int64_t ahead;
};

// Sums of a vector of columns of a row, where they are kept between parts.
FUSERL_INLINE float* kept_sums(const Product& task, std::int64_t row, std::int64_t column) {
    return static_cast<float*>(task.out) + row * task.out_stride + column;
}

template <typename T>
FUSERL_INLINE void write(const Product& task, std::int64_t row, std::int64_t column, bool is_done,
                         Floats x) {
    const std::int64_t count = task.weight.num_outputs - column;
    if (count <= 0) return;
    if (is_done && task.bias)
        x = x + Simd::load_some(static_cast<const T*>(task.bias) + column, count);
    if (task.out_dtype == Dtype::kFloat32)
        Simd::store_some(kept_sums(task, row, column), x, count);
    else
        Simd::store_some(static_cast<T*>(task.out) + row * task.out_stride + column, x, count);
}

// kRows rows from `row` on times kPanels panels from `panel` on, for a part of the walk.
template <typename T, int kRows, int kPanels>
void tile(const Product& task, std::int64_t row, std::int64_t panel, const Part& part) {
    constexpr int kVectors = kPanels * kPanelVectors;
    constexpr std::int64_t kChainSteps = kChain / Step<T>::kInputs;
    const PackedWeight& weight = task.weight;
    const std::int64_t num_steps = weight.panel_rows();
    const bool is_odd = Step<T>::kInputs == 2 && weight.num_inputs % 2 != 0;
    const T* rows = static_cast<const T*>(task.rows) + row * task.row_stride;
    const auto panel_at = [&](std::int64_t index) {
        return static_cast<const std::uint32_t*>(weight.panels) + index * num_steps * kPanel;
    };
    const std::uint32_t* ahead = panel_at(part.ahead);
    const std::uint32_t* panels[kPanels];
    for (int p = 0; p < kPanels; ++p) panels[p] = panel_at(panel + p);

    Floats totals[kRows][kVectors];
    std::int64_t stop = part.first;
    do {  // once where there is no input
        const std::int64_t first = stop;
        stop = part.last - first < kChainSteps ? part.last : first + kChainSteps;
        const bool is_cut = is_odd && stop == num_steps;
        if (first == 0) {
            walk<T>(task, rows, panels, ahead, first, stop, is_cut, totals);
            continue;
        }
        if (first == part.first)
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < kVectors; ++v) {
                    const std::int64_t column = panel * kPanel + v * kLanesOf;
                    const std::int64_t count = weight.num_outputs - column;
                    totals[r][v] = count <= 0 ? Floats{}
                                              : Simd::load_some(kept_sums(task, row + r, column),
                                                                count);
                }
        Floats sums[kRows][kVectors];
        walk<T>(task, rows, panels, ahead, first, stop, is_cut, sums);
        for (int r = 0; r < kRows; ++r)
            for (int v = 0; v < kVectors; ++v) totals[r][v] += sums[r][v];
    } while (stop < part.last);
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v)
            write<T>(task, row + r, panel * kPanel + v * kLanesOf, part.last == num_steps,
                     totals[r][v]);
}

// The last rows, fewer than a tile's.
template <typename T, int kRows, int kPanels>
FUSERL_INLINE void last_rows(const Product& task, std::int64_t row, std::int64_t last_row,
                             std::int64_t panel, const Part& part) {
    if constexpr (kRows > 0) {
        if (last_row - row == kRows) return tile<T, kRows, kPanels>(task, row, panel, part);
        last_rows<T, kRows - 1, kPanels>(task, row, last_row, panel, part);
    }
}

template <typename T, int kPanels>
void columns(const Product& task, std::int64_t first_row, std::int64_t last_row,
             std::int64_t panel, Part part) {
    // While a few rows are multiplied, the next weights come from memory: each of the first tiles
    // asks for one of the panels that come next.
    const std::int64_t num_panels = task.weight.num_panels();
    std::int64_t row = first_row, next = panel + kPanels;
    const auto asking = [&] {
        part.ahead = next < panel + 2 * kPanels && next < num_panels ? next : panel;
        ++next;
        return part;
    };
    for (; row + kTileRows <= last_row; row += kTileRows)
        tile<T, kTileRows, kPanels>(task, row, panel, asking());
    last_rows<T, kTileRows - 1, kPanels>(task, row, last_row, panel, asking());
}

template <typename T>
void multiply_as(const Product& task, std::int64_t first_row, std::int64_t last_row,
                 std::int64_t first_panel, std::int64_t last_panel) {
    // Of a long walk so much at a time that a tile's panels stay in the cache for all rows; float32
    // sums are kept in the result meanwhile, which changes no bit.
    constexpr std::int64_t kTogether = 2 * kChain / Step<T>::kInputs;
    const std::int64_t num_steps = task.weight.panel_rows();
    const std::int64_t together =
        task.out_dtype == Dtype::kFloat32 && num_steps > 2 * kTogether ? kTogether : num_steps;
    std::int64_t stop = 0;
    do {  // once where there is no input
        const std::int64_t first = stop;
        stop = num_steps - first < together ? num_steps : first + together;
        const Part part{first, stop, 0};
        std::int64_t panel = first_panel;
        for (; panel + kTilePanels <= last_panel; panel += kTilePanels)
            columns<T, kTilePanels>(task, first_row, last_row, panel, part);
        if constexpr (kTilePanels == 3) {
            if (last_panel - panel == 2) columns<T, 2>(task, first_row, last_row, panel, part);
            if (last_panel - panel == 1) columns<T, 1>(task, first_row, last_row, panel, part);
        }
    } while (stop < num_steps);
}

#ifndef FUSERL_DOT_BF16
void multiply(const Product& task, std::int64_t first_row, std::int64_t last_row,
              std::int64_t first_panel, std::int64_t last_panel) {
    switch (task.weight.dtype) {
        case Dtype::kFloat32:
            return multiply_as<float>(task, first_row, last_row, first_panel, last_panel);
        case Dtype::kBFloat16:
            return multiply_as<BFloat16>(task, first_row, last_row, first_panel, last_panel);
        case Dtype::kFloat16:
            return multiply_as<Float16>(task, first_row, last_row, first_panel, last_panel);
    }
}
#endif

}  // namespace products

#ifndef FUSERL_DOT_BF16
constexpr ProductFunctions product_functions{products::multiply, products::kTilePanels};
#endif

// The row loops over a struct Simd, written once. Each kernels_*.cpp defines Simd for an instruction
// set and includes this inside its anonymous namespace, so that no copy can stand in for another.

using Floats = Simd::Floats;

// While one lives, results too small for a normal float32 become 0: they matter to no sum, and
// the processor takes a hundred times as long over each.
class FlushSubnormals {
#ifdef FUSERL_X86
   public:
    FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
    ~FlushSubnormals() { _mm_setcsr(saved_); }

   private:
    unsigned saved_;
#endif
};

constexpr std::int64_t kBlock = 2048;  // columns summed in float32 before the sum goes to double
constexpr std::int64_t kAhead = 8192;  // bytes: the processor's own prefetch ends at a page's end

// Logits as they are.
struct NoCap {
    FUSERL_INLINE explicit NoCap(float) {}
    FUSERL_INLINE Floats operator()(Floats x) const { return x; }
    FUSERL_INLINE Floats chain(Floats gradient, Floats) const { return gradient; }
};

// softcap * tanh(x / softcap)
class TanhCap {
   public:
    FUSERL_INLINE explicit TanhCap(float softcap)
        : softcap_(softcap), inverse_(1.0f / softcap), scale_(0.5) {}

    // The same bits wherever it stands.
    FUSERL_INLINE Floats operator()(Floats x) const {
        return Simd::rounded_value(hyperbolic_tangent(x * inverse_) * softcap_);
    }

    // The gradient of x, from that of the capped x.
    FUSERL_INLINE Floats chain(Floats gradient, Floats capped) const {
        const Floats tangent = capped * inverse_;
        return gradient * (1.0f - tangent * tangent);
    }

   private:
    // Near 0 an odd minimax polynomial (relative error 4e-9); elsewhere from e^-2|y|.
    FUSERL_INLINE Floats hyperbolic_tangent(Floats y) const {
        const Floats square = y * y;
        Floats p = Simd::splat(-0.0057049775f);
        p = p * square + 0.020639079f;
        p = p * square - 0.05373971f;
        p = p * square + 0.13331442f;
        p = p * square - 0.3333328f;
        const Floats near = y + y * square * p;
        const Floats minus = y < 0.0f ? y : -y;  // -|y|
        const Floats e = Simd::weight(Simd::at_least(minus, Simd::splat(-20.0f)), scale_);
        const Floats size = (1.0f - e) / (1.0f + e);
        const Floats far = y < 0.0f ? -size : size;
        return minus > -0.625f ? near : far;
    }

    float softcap_;
    float inverse_;
    Simd::Scale scale_;
};

// Ask for the columns that come kAhead bytes after the two vectors at `source`.
template <typename T>
FUSERL_INLINE void prefetch_pair(const T* source) {
    const char* ahead = reinterpret_cast<const char*>(source) + kAhead;
    for (std::size_t byte = 0; byte < 2 * Simd::kWidth * sizeof(T); byte += 64)
        __builtin_prefetch(ahead + byte, 0, 2);
}

// How a vector lies in its block: as one of the two of load_pair, or alone, in order.
enum Part { kFirst, kSecond, kAlone };

// Call visit(x, column, part) with vectors of capped logits that cover the columns of a block once;
// `column` is where the pair, or the vector alone, begins. Absent columns are -inf.
template <bool kPrefetch, typename T, typename Cap, typename Visit>
FUSERL_INLINE void each_vector(const T* block, std::int64_t count, const Cap& cap,
                               const Visit& visit) {
    std::int64_t column = 0;
    for (; column + 2 * Simd::kWidth <= count; column += 2 * Simd::kWidth) {
        const T* source = block + column;
        if (kPrefetch) prefetch_pair(source);
        Floats x[2];
        Simd::load_pair(source, x);
        visit(cap(x[0]), column, kFirst);
        visit(cap(x[1]), column, kSecond);
    }
    for (; column < count; column += Simd::kWidth) {
        Floats x = cap(Simd::load_some(block + column, count - column));
        for (std::int64_t lane = count - column; lane < Simd::kWidth; ++lane) x[lane] = -kInfinity;
        visit(x, column, kAlone);
    }
}

struct Sums {
    float maximum = -kInfinity;
    double weights = 0.0;   // sum of e^(d / temperature), d = x - maximum
    double products = 0.0;  // sum of d e^(d / temperature)

    // Make the sums relative to `raised` instead of `reference`; the factor for plain weights.
    FUSERL_INLINE double rebase(float reference, float raised, double temperature) {
        const double step = static_cast<double>(reference) - raised;
        const double shrink = std::exp(step / temperature);
        products = shrink * (products + step * weights);
        weights *= shrink;
        return shrink;
    }
};

// What block_sums does with each weight beside summing it: nothing.
struct NoUse {
    FUSERL_INLINE void operator()(Floats, std::int64_t, Part) const {}
};

// The sums of a block relative to `reference`, and the block's own maximum on the way.
template <bool kEntropy, bool kPrefetch, typename T, typename Cap, typename Use = NoUse>
FUSERL_INLINE Sums block_sums(const T* block, std::int64_t count, float reference,
                              const Simd::Scale& scale, const Cap& cap, const Use& use = {}) {
    Floats maxima[2] = {Simd::splat(-kInfinity), Simd::splat(-kInfinity)};
    Floats weights[2] = {Floats{}, Floats{}};
    Floats products[2] = {Floats{}, Floats{}};
    each_vector<kPrefetch>(block, count, cap, [&](Floats x, std::int64_t column, Part part)
                                                  FUSERL_LAMBDA {
        const int sum = part == kSecond;
        const Floats d = Simd::at_least(x - reference, Simd::splat(scale.floor));
        const Floats weight = Simd::weight(d, scale);
        maxima[sum] = Simd::grown(maxima[sum], x);
        weights[sum] += weight;
        if (kEntropy) products[sum] += d * weight;
        use(weight, column, part);
    });
    Sums sums;
    sums.maximum = Simd::lane_maximum(Simd::grown(maxima[0], maxima[1]));
    sums.weights = Simd::lane_sum(weights[0] + weights[1]);
    if (kEntropy) sums.products = Simd::lane_sum(products[0] + products[1]);
    return sums;
}

// One walk over memory, block by block relative to the maximum so far. A block that raises it is
// done again while it is in the L1 cache, and the sums before it shrink; in a row of many blocks
// few do. A NaN anywhere makes the sums NaN.
template <bool kEntropy, typename T, typename Cap>
FUSERL_INLINE Sums row_sums(const T* row, std::int64_t size, double temperature, const Cap& cap) {
    const Simd::Scale scale(temperature);
    Sums sums;
    float reference = -kLargest;  // the maximum so far, kept finite for rows that start with -inf
    for (std::int64_t start = 0; start < size; start += kBlock) {
        const T* block = row + start;
        const std::int64_t count = size - start < kBlock ? size - start : kBlock;
        Sums part = block_sums<kEntropy, true>(block, count, reference, scale, cap);
        sums.maximum = part.maximum > sums.maximum ? part.maximum : sums.maximum;
        if (part.maximum > reference) {
            sums.rebase(reference, part.maximum, temperature);
            reference = part.maximum;
            part = block_sums<kEntropy, false>(block, count, reference, scale, cap);
        }
        sums.weights += part.weights;
        sums.products += part.products;
    }
    return sums;
}

FUSERL_INLINE double row_temperature(const Rows& rows, std::int64_t index) {
    return rows.temperatures ? rows.temperatures[index] : rows.temperature;
}

// log_softmax at a logit, from the row's maximum and the log of its weights.
FUSERL_INLINE float logprob_of(double x, float maximum, double log_sum, double temperature) {
    return static_cast<float>((x - maximum) / temperature - log_sum);
}

template <typename T, typename Cap>
void forward_rows(const Forward& task, std::int64_t first, std::int64_t last) {
    const Rows& rows = task.rows;
    const Cap cap(rows.softcap);
    for (std::int64_t index = first; index < last; ++index) {
        float logprob = 0.0f, entropy = 0.0f, maximum = 0.0f;
        double log_sum = 0.0;
        if (rows.loss_mask == nullptr || rows.loss_mask[index]) {
            const T* row = static_cast<const T*>(rows.logits) + index * rows.row_stride;
            const double temperature = row_temperature(rows, index);
            const Sums sums = task.entropy
                                  ? row_sums<true>(row, rows.vocab_size, temperature, cap)
                                  : row_sums<false>(row, rows.vocab_size, temperature, cap);
            maximum = sums.maximum;
            log_sum = std::log(sums.weights);
            entropy =
                static_cast<float>(log_sum - sums.products / (temperature * sums.weights));
            const std::int64_t token = rows.token_ids[index];
            logprob = kNaN;
            if (token >= 0 && token < rows.vocab_size) {
                const double x = cap(Simd::load_some(row + token, 1))[0];
                logprob = logprob_of(x, maximum, log_sum, temperature);
            }
        }
        task.logprobs[index] = logprob;
        if (task.entropy) task.entropy[index] = entropy;
        task.stats[index] = maximum;
        task.stats[rows.num_rows + index] = static_cast<float>(log_sum);
    }
}

// The gradient of one row: (a p - b onehot - c p (logp + entropy)) / temperature, times the cap's
// slope, with a = b = -g and c = h for gradients g to the logprob and h to the entropy. With
// d = x - max and p = e^(d / temperature - log_sum), a column other than the token's gets
// weight(d) (constant + linear d).
class Gradient {
   public:
    FUSERL_INLINE Gradient(double maximum, double log_sum, double entropy, double g, double h,
                           double temperature)
        : maximum_(maximum), log_sum_(log_sum), entropy_(entropy), g_(g), h_(h),
          temperature_(temperature), scale_(temperature) {
        const double unit = std::exp(-log_sum) / temperature;
        constant_ = static_cast<float>(-(g + h * (entropy - log_sum)) * unit);
        linear_ = static_cast<float>(-h * unit / temperature);
    }

    FUSERL_INLINE Floats operator()(Floats x) const {
        const float maximum = static_cast<float>(maximum_);
        const Floats d = Simd::at_least(x - maximum, Simd::splat(scale_.floor));
        return Simd::weight(d, scale_) * (d * linear_ + constant_);
    }

    // The token's own entry: 1 - p comes from expm1, which keeps its digits when p is close to 1.
    FUSERL_INLINE float at_token(double x) const {
        const double logp = (x - maximum_) / temperature_ - log_sum_;
        const double p = std::exp(logp);
        const double slope = p == 0.0 ? 0.0 : h_ * p * (logp + entropy_);
        return static_cast<float>((g_ * -std::expm1(logp) - slope) / temperature_);
    }

   private:
    double maximum_, log_sum_, entropy_, g_, h_, temperature_;
    Simd::Scale scale_;
    float constant_, linear_;
};

// Writes follow the reads of the same columns and walk upwards with them: `target` may start where
// `row` does, with elements as wide or narrower.
template <typename T, typename U, typename Cap>
FUSERL_INLINE void write_gradient(const T* row, std::int64_t size, const Gradient& gradient,
                                  const Cap& cap, U* target) {
    const auto entry = [&](Floats x) FUSERL_LAMBDA {
        const Floats capped = cap(x);
        return cap.chain(gradient(capped), capped);
    };
    std::int64_t column = 0;
    for (; column + 2 * Simd::kWidth <= size; column += 2 * Simd::kWidth) {
        const T* source = row + column;
        prefetch_pair(source);
        Floats x[2];
        if constexpr (std::is_same_v<T, U>) {
            Simd::load_pair(source, x);
            const Floats out[2] = {entry(x[0]), entry(x[1])};
            Simd::store_pair(target + column, out);
        } else {
            x[0] = Simd::load(source);
            x[1] = Simd::load(source + Simd::kWidth);
            Simd::store(target + column, entry(x[0]));
            Simd::store(target + column + Simd::kWidth, entry(x[1]));
        }
    }
    for (; column < size; column += Simd::kWidth) {
        const Floats x = Simd::load_some(row + column, size - column);
        Simd::store_some(target + column, entry(x), size - column);
    }
}

template <typename T, typename U, typename Cap>
void backward_rows(const Backward& task, std::int64_t first, std::int64_t last) {
    const Rows& rows = task.rows;
    const std::int64_t size = rows.vocab_size;
    const Cap cap(rows.softcap);
    for (std::int64_t index = first; index < last; ++index) {
        U* target = static_cast<U*>(task.out) + index * task.out_stride;
        if (rows.loss_mask && !rows.loss_mask[index]) {
            std::memset(target, 0, sizeof(U) * size);
            continue;
        }
        const T* row = static_cast<const T*>(rows.logits) + index * rows.row_stride;
        const std::int64_t token = rows.token_ids[index];
        const bool inside = token >= 0 && token < size;
        const bool with_entropy = task.grad_entropy != nullptr;
        const Gradient gradient(task.stats[index], task.stats[rows.num_rows + index],
                                with_entropy ? task.entropy[index] : 0.0f,
                                inside ? task.grad_logprobs[index] : kNaN,
                                with_entropy ? task.grad_entropy[index] : 0.0f,
                                row_temperature(rows, index));
        // The token's entry is made before the row may be overwritten, and written after.
        Floats at_token{};
        if (inside) {
            const Floats x = cap(Simd::load_some(row + token, 1));
            at_token = cap.chain(Simd::splat(gradient.at_token(x[0])), x);
        }
        write_gradient(row, size, gradient, cap, target);
        if (inside) Simd::store_some(target + token, at_token, 1);
    }
}

template <typename T>
void forward_rows(const Forward& task, std::int64_t first, std::int64_t last) {
    if (task.rows.softcap == 0.0f) return forward_rows<T, NoCap>(task, first, last);
    forward_rows<T, TanhCap>(task, first, last);
}

template <typename T, typename U>
void backward_rows(const Backward& task, std::int64_t first, std::int64_t last) {
    if (task.rows.softcap == 0.0f) return backward_rows<T, U, NoCap>(task, first, last);
    backward_rows<T, U, TanhCap>(task, first, last);
}

void forward(const Forward& task, std::int64_t first, std::int64_t last) {
    [[maybe_unused]] const FlushSubnormals flush;
    switch (task.rows.dtype) {
        case Dtype::kFloat32: return forward_rows<float>(task, first, last);
        case Dtype::kBFloat16: return forward_rows<BFloat16>(task, first, last);
        case Dtype::kFloat16: return forward_rows<Float16>(task, first, last);
    }
}

void backward(const Backward& task, std::int64_t first, std::int64_t last) {
    [[maybe_unused]] const FlushSubnormals flush;
    if (task.rows.dtype == Dtype::kFloat32 && task.out_dtype == Dtype::kBFloat16)
        return backward_rows<float, BFloat16>(task, first, last);
    switch (task.rows.dtype) {
        case Dtype::kFloat32: return backward_rows<float, float>(task, first, last);
        case Dtype::kBFloat16: return backward_rows<BFloat16, BFloat16>(task, first, last);
        case Dtype::kFloat16: return backward_rows<Float16, Float16>(task, first, last);
    }
}

constexpr RowFunctions row_functions{forward, backward};

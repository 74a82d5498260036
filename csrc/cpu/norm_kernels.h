// RMSNorm and LayerNorm: the loops over a struct Simd, as in row_kernels.h. A row is read from
// memory once; what later walks read again is in the cache.

constexpr std::int64_t kRunRows = 32;  // gradients of a vector added in float32 before they go on
constexpr int kRowSums = 4;            // sums of a row that do not wait for one another

// The columns that there are, and zeros.
template <typename T>
FUSERL_INLINE Floats load_or_zero(const T* source, std::int64_t count) {
    Floats x = Simd::load_some(source, count);
    for (std::int64_t lane = count; lane < Simd::kWidth; ++lane) x[lane] = 0.0f;
    return x;
}

// Call visit(column, count, sum) with vectors that cover a row once, in turn for each of its sums.
template <typename Visit>
FUSERL_INLINE void each_column(std::int64_t size, const Visit& visit) {
    constexpr std::int64_t kWidth = Simd::kWidth;
    std::int64_t column = 0;
    for (; column + kRowSums * kWidth <= size; column += kRowSums * kWidth) {
        visit(column, kWidth, 0);
        visit(column + kWidth, kWidth, 1);
        visit(column + 2 * kWidth, kWidth, 2);
        visit(column + 3 * kWidth, kWidth, 3);
    }
    for (; column < size; column += kWidth) visit(column, size - column, 0);
}

FUSERL_INLINE double total(const Floats (&sums)[kRowSums]) {
    return Simd::lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The sum of term(column, count), whose lanes past count are 0.
template <typename Term>
FUSERL_INLINE double row_total(std::int64_t size, const Term& term) {
    Floats sums[kRowSums] = {};
    each_column(size, [&](std::int64_t column, std::int64_t count, int sum) FUSERL_LAMBDA {
        sums[sum] += term(column, count);
    });
    return total(sums);
}

template <typename T>
FUSERL_INLINE const T* norm_row(const Norm& norm, std::int64_t index) {
    return static_cast<const T*>(norm.rows) + index / norm.inner_rows * norm.outer_stride +
           index % norm.inner_rows * norm.inner_stride;
}

template <bool kCentered>
FUSERL_INLINE Floats normalized(Floats x, float mean, float rstd) {
    return kCentered ? (x - mean) * rstd : x * rstd;
}

// The sum of a row for its mean, or of its squares.
template <bool kCentered, typename Column>
FUSERL_INLINE double first_total(std::int64_t size, const Column& of) {
    return row_total(size, [&](std::int64_t column, std::int64_t count) FUSERL_LAMBDA {
        const Floats x = of(column, count);
        return kCentered ? x : x * x;
    });
}

template <typename T, bool kCentered>
void norm_forward_rows(const NormForward& task, const float* scale, const float* bias,
                       std::int64_t first, std::int64_t last) {
    const Norm& norm = task.norm;
    const std::int64_t size = norm.hidden_size;
    for (std::int64_t index = first; index < last; ++index) {
        const T* row = norm_row<T>(norm, index);
        double sum;
        if (task.residual) {
            const T* residual = static_cast<const T*>(task.residual) + index * size;
            T* summed = static_cast<T*>(task.summed) + index * size;
            sum = first_total<kCentered>(
                size, [&](std::int64_t column, std::int64_t count) FUSERL_LAMBDA {
                    const Floats x = load_or_zero(row + column, count);
                    const Floats added = x + load_or_zero(residual + column, count);
                    Simd::store_some(summed + column, added, count);
                    return load_or_zero(summed + column, count);  // as it was rounded
                });
            row = summed;
        } else {
            sum = first_total<kCentered>(
                size, [&](std::int64_t column, std::int64_t count) FUSERL_LAMBDA {
                    return load_or_zero(row + column, count);
                });
        }
        float mean = 0.0f;
        if (kCentered) {
            mean = static_cast<float>(sum / size);
            sum = row_total(size, [&](std::int64_t column, std::int64_t count) FUSERL_LAMBDA {
                Floats d = Simd::load_some(row + column, count) - mean;
                for (std::int64_t lane = count; lane < Simd::kWidth; ++lane) d[lane] = 0.0f;
                return d * d;
            });
        }
        const float rstd = static_cast<float>(1.0 / std::sqrt(sum / size + task.eps));
        T* y = static_cast<T*>(task.y) + index * size;
        each_column(size, [&](std::int64_t column, std::int64_t count, int) FUSERL_LAMBDA {
            const Floats x = Simd::load_some(row + column, count);
            Floats out = normalized<kCentered>(x, mean, rstd);
            out = out * Simd::load_some(scale + column, count);
            if (kCentered && bias) out = out + Simd::load_some(bias + column, count);
            Simd::store_some(y + column, out, count);
        });
        task.stats[index] = rstd;
        if (kCentered) task.stats[norm.num_rows + index] = mean;
    }
}

// Adds what `run` holds to `sums`, and clears it.
FUSERL_INLINE void end_run(float* run, double* sums, std::int64_t size) {
    for (std::int64_t i = 0; i < size; ++i) {
        sums[i] += run[i];
        run[i] = 0.0f;
    }
}

FUSERL_INLINE void add_some(float* target, Floats x, std::int64_t count) {
    Simd::store_some(target, Simd::load_some(target, count) + x, count);
}

template <typename T, bool kCentered, bool kVectors>
void norm_backward_rows(const NormBackward& task, const float* scale, float* run, double* sums,
                        std::int64_t first, std::int64_t last) {
    const Norm& norm = task.norm;
    const std::int64_t size = norm.hidden_size;
    for (std::int64_t index = first; index < last; ++index) {
        const T* row = norm_row<T>(norm, index);
        const T* grad_y = static_cast<const T*>(task.grad_y) + index * size;
        const float rstd = task.stats[index];
        const float mean = kCentered ? task.stats[norm.num_rows + index] : 0.0f;
        Floats products[kRowSums] = {}, plain[kRowSums] = {};
        each_column(size, [&](std::int64_t column, std::int64_t count, int sum) FUSERL_LAMBDA {
            const Floats g = load_or_zero(grad_y + column, count);
            const Floats x = load_or_zero(row + column, count);
            const Floats n = normalized<kCentered>(x, mean, rstd);
            const Floats v = g * load_or_zero(scale + column, count);
            products[sum] += v * n;
            if (kCentered) plain[sum] += v;
            if (kVectors) add_some(run + column, g * n, count);
            if (kVectors && kCentered) add_some(run + size + column, g, count);
        });
        const float slope = static_cast<float>(total(products) / size);
        const float level = kCentered ? static_cast<float>(total(plain) / size) : 0.0f;
        const T* grad_summed =
            task.grad_summed ? static_cast<const T*>(task.grad_summed) + index * size : nullptr;
        T* grad_x = static_cast<T*>(task.grad_x) + index * size;
        each_column(size, [&](std::int64_t column, std::int64_t count, int) FUSERL_LAMBDA {
            const Floats g = Simd::load_some(grad_y + column, count);
            const Floats x = Simd::load_some(row + column, count);
            const Floats n = normalized<kCentered>(x, mean, rstd);
            Floats out = g * Simd::load_some(scale + column, count) - n * slope;
            if (kCentered) out = out - level;
            out = out * rstd;
            if (grad_summed) out = out + Simd::load_some(grad_summed + column, count);
            Simd::store_some(grad_x + column, out, count);
        });
        if (kVectors && ((index - first + 1) % kRunRows == 0 || index + 1 == last))
            end_run(run, sums, (kCentered ? 2 : 1) * size);
    }
}

template <typename T>
void norm_forward_rows(const NormForward& task, const float* scale, const float* bias,
                       std::int64_t first, std::int64_t last) {
    if (task.norm.centered) return norm_forward_rows<T, true>(task, scale, bias, first, last);
    norm_forward_rows<T, false>(task, scale, bias, first, last);
}

template <typename T, bool kCentered>
void norm_backward_rows(const NormBackward& task, const float* scale, float* run, double* sums,
                        std::int64_t first, std::int64_t last) {
    if (run) return norm_backward_rows<T, kCentered, true>(task, scale, run, sums, first, last);
    norm_backward_rows<T, kCentered, false>(task, scale, run, sums, first, last);
}

template <typename T>
void norm_backward_rows(const NormBackward& task, const float* scale, float* run, double* sums,
                        std::int64_t first, std::int64_t last) {
    if (task.norm.centered)
        return norm_backward_rows<T, true>(task, scale, run, sums, first, last);
    norm_backward_rows<T, false>(task, scale, run, sums, first, last);
}

template <typename T>
void widen_vector(const T* source, float offset, std::int64_t count, float* target) {
    for (std::int64_t i = 0; i < count; i += Simd::kWidth)
        Simd::store_some(target + i, Simd::load_some(source + i, count - i) + offset, count - i);
}

void norm_widen(const void* source, Dtype dtype, float offset, std::int64_t count, float* target) {
    switch (dtype) {
        case Dtype::kFloat32:
            return widen_vector(static_cast<const float*>(source), offset, count, target);
        case Dtype::kBFloat16:
            return widen_vector(static_cast<const BFloat16*>(source), offset, count, target);
        case Dtype::kFloat16:
            return widen_vector(static_cast<const Float16*>(source), offset, count, target);
    }
}

void norm_forward_of(const NormForward& task, const float* scale, const float* bias,
                     std::int64_t first, std::int64_t last) {
    [[maybe_unused]] const FlushSubnormals flush;
    switch (task.norm.dtype) {
        case Dtype::kFloat32:
            return norm_forward_rows<float>(task, scale, bias, first, last);
        case Dtype::kBFloat16:
            return norm_forward_rows<BFloat16>(task, scale, bias, first, last);
        case Dtype::kFloat16:
            return norm_forward_rows<Float16>(task, scale, bias, first, last);
    }
}

void norm_backward_of(const NormBackward& task, const float* scale, float* run, double* sums,
                      std::int64_t first, std::int64_t last) {
    [[maybe_unused]] const FlushSubnormals flush;
    switch (task.norm.dtype) {
        case Dtype::kFloat32:
            return norm_backward_rows<float>(task, scale, run, sums, first, last);
        case Dtype::kBFloat16:
            return norm_backward_rows<BFloat16>(task, scale, run, sums, first, last);
        case Dtype::kFloat16:
            return norm_backward_rows<Float16>(task, scale, run, sums, first, last);
    }
}

constexpr NormFunctions norm_functions{norm_widen, norm_forward_of, norm_backward_of};

// The loops of glu.h over a struct Simd.

namespace glu {

// An activation at x, and its slope there.
struct Value {
    Floats value, slope;
};

// e^-size for size >= 0; NaN stays NaN.
FUSERL_INLINE Floats falling(Floats size) {
    const Simd::Scale unit(1.0);
    return Simd::weight(Simd::at_least(-size, Simd::splat(unit.floor)), unit);
}

FUSERL_INLINE Floats magnitude(Floats x) { return x < 0.0f ? -x : x; }

// x sigmoid(u), and its slope where u changes by `change` as x does. 1 - sigmoid(u) is
// sigmoid(-u), without cancellation.
FUSERL_INLINE Value gated(Floats x, Floats u, Floats change) {
    const Floats e = falling(magnitude(u));
    const Floats larger = 1.0f / (1.0f + e), smaller = e * larger;
    const Floats share = u < 0.0f ? smaller : larger;
    return {x * share, share + larger * smaller * x * change};
}

struct Silu {
    FUSERL_INLINE Value operator()(Floats x) const { return gated(x, x, Simd::splat(1.0f)); }
};

// 0.5 x (1 + tanh(z)) is x sigmoid(2 z).
struct GeluTanh {
    FUSERL_INLINE Value operator()(Floats x) const {
        constexpr float kTwice = 1.5957691216f;  // 2 sqrt(2 / pi)
        // Far out sigmoid is 0 or 1 and nothing else counts; held there, the cube stays finite.
        Floats held = x < -100.0f ? Simd::splat(-100.0f) : x;
        held = held > 100.0f ? Simd::splat(100.0f) : held;
        const Floats square = held * held;
        const Floats u = kTwice * held * (1.0f + 0.044715f * square);
        return gated(x, u, kTwice * (1.0f + 0.134145f * square));
    }
};

// x Phi(x) with the normal distribution Phi. For x >= 0 its tail is e^(-x^2 / 2) t P(t) with
// t = 1 / (1 + 0.21 x) and a minimax polynomial (relative error 2.3e-8 before rounding, to x = 15).
struct Gelu {
    FUSERL_INLINE Value operator()(Floats x) const {
        const Floats size = magnitude(x);
        const Floats bounded = size > 20.0f ? Simd::splat(20.0f) : size;
        const Floats e = falling(0.5f * bounded * bounded);
        const Floats t = 1.0f / (1.0f + 0.21f * bounded);
        Floats p = Simd::splat(-0.07094634f);
        p = p * t + 0.28008724f;
        p = p * t - 0.32288151f;
        p = p * t + 0.34075952f;
        p = p * t - 0.08776602f;
        p = p * t + 0.12214333f;
        p = p * t + 0.06992564f;
        p = p * t + 0.08495968f;
        p = p * t + 0.08371846f;
        const Floats tail = e * (t * p);
        const Floats share = x < 0.0f ? tail : 1.0f - tail;
        const Floats held = x < 0.0f ? -bounded : bounded;
        return {x * share, share + held * (e * 0.3989422804f)};
    }
};

struct Relu {
    FUSERL_INLINE Value operator()(Floats x) const {
        return {x < 0.0f ? Floats{} : x, x > 0.0f ? Simd::splat(1.0f) : Floats{}};
    }
};

template <typename T, typename Activate>
void forward_rows(const Glu& task, std::int64_t first, std::int64_t last) {
    const Activate activate;
    const std::int64_t size = task.size;
    for (std::int64_t row = first; row < last; ++row) {
        const T* gate = static_cast<const T*>(task.gate_up) + row * task.row_stride;
        const T* up = gate + size;
        T* out = static_cast<T*>(task.out) + row * size;
        std::int64_t column = 0;
        for (; column + 2 * Simd::kWidth <= size; column += 2 * Simd::kWidth) {
            Floats x[2], y[2];
            Simd::load_pair(gate + column, x);
            Simd::load_pair(up + column, y);
            const Floats products[2] = {activate(x[0]).value * y[0], activate(x[1]).value * y[1]};
            Simd::store_pair(out + column, products);
        }
        for (; column < size; column += Simd::kWidth) {
            const std::int64_t count = size - column;
            const Floats x = Simd::load_some(gate + column, count);
            const Floats y = Simd::load_some(up + column, count);
            Simd::store_some(out + column, activate(x).value * y, count);
        }
    }
}

template <typename T, typename Activate>
void backward_rows(const Glu& task, std::int64_t first, std::int64_t last) {
    const Activate activate;
    const std::int64_t size = task.size;
    for (std::int64_t row = first; row < last; ++row) {
        const T* gate = static_cast<const T*>(task.gate_up) + row * task.row_stride;
        const T* up = gate + size;
        const T* grad = static_cast<const T*>(task.grad) + row * task.grad_stride;
        T* grad_gate = static_cast<T*>(task.out) + 2 * row * size;
        T* grad_up = grad_gate + size;
        std::int64_t column = 0;
        for (; column + 2 * Simd::kWidth <= size; column += 2 * Simd::kWidth) {
            Floats x[2], y[2], g[2];
            Simd::load_pair(gate + column, x);
            Simd::load_pair(up + column, y);
            Simd::load_pair(grad + column, g);
            for (int part = 0; part < 2; ++part) {
                const Value at = activate(x[part]);
                x[part] = g[part] * y[part] * at.slope;
                y[part] = g[part] * at.value;
            }
            Simd::store_pair(grad_gate + column, x);
            Simd::store_pair(grad_up + column, y);
        }
        for (; column < size; column += Simd::kWidth) {
            const std::int64_t count = size - column;
            const Value at = activate(Simd::load_some(gate + column, count));
            const Floats y = Simd::load_some(up + column, count);
            const Floats g = Simd::load_some(grad + column, count);
            Simd::store_some(grad_gate + column, g * y * at.slope, count);
            Simd::store_some(grad_up + column, g * at.value, count);
        }
    }
}

template <typename T>
void forward_of(const Glu& task, std::int64_t first, std::int64_t last) {
    switch (task.activation) {
        case Activation::kSilu: return forward_rows<T, Silu>(task, first, last);
        case Activation::kGelu: return forward_rows<T, Gelu>(task, first, last);
        case Activation::kGeluTanh: return forward_rows<T, GeluTanh>(task, first, last);
        case Activation::kRelu: return forward_rows<T, Relu>(task, first, last);
    }
}

template <typename T>
void backward_of(const Glu& task, std::int64_t first, std::int64_t last) {
    switch (task.activation) {
        case Activation::kSilu: return backward_rows<T, Silu>(task, first, last);
        case Activation::kGelu: return backward_rows<T, Gelu>(task, first, last);
        case Activation::kGeluTanh: return backward_rows<T, GeluTanh>(task, first, last);
        case Activation::kRelu: return backward_rows<T, Relu>(task, first, last);
    }
}

inline void forward(const Glu& task, std::int64_t first, std::int64_t last) {
    switch (task.dtype) {
        case Dtype::kFloat32: return forward_of<float>(task, first, last);
        case Dtype::kBFloat16: return forward_of<BFloat16>(task, first, last);
        case Dtype::kFloat16: return forward_of<Float16>(task, first, last);
    }
}

inline void backward(const Glu& task, std::int64_t first, std::int64_t last) {
    switch (task.dtype) {
        case Dtype::kFloat32: return backward_of<float>(task, first, last);
        case Dtype::kBFloat16: return backward_of<BFloat16>(task, first, last);
        case Dtype::kFloat16: return backward_of<Float16>(task, first, last);
    }
}

}  // namespace glu

constexpr GluFunctions glu_functions{glu::forward, glu::backward};

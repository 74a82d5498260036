// The loops of rotary.h over a struct Simd. Vectors that reach past a head's last element hold
// anything there, and nothing of it is stored; local rows have room for them.

namespace rotary {

constexpr std::int64_t kRoom = kMaxHeadDim + Simd::kWidth;

// The first `count` lanes, zero in the others.
FUSERL_INLINE Floats first_lanes(Floats x, std::int64_t count) {
    for (std::int64_t lane = count; lane < Simd::kWidth; ++lane) x[lane] = 0.0f;
    return x;
}

// Call visit(i, count) on vectors that cover [0, size): whole ones, whose count the compiler knows,
// and perhaps part of one.
template <typename Visit>
FUSERL_INLINE void each_vector_of(std::int64_t size, const Visit& visit) {
    std::int64_t i = 0;
    for (; i + Simd::kWidth <= size; i += Simd::kWidth) visit(i, Simd::kWidth);
    if (i < size) visit(i, size - i);
}

// Neighbouring lanes exchanged.
FUSERL_INLINE Floats swapped(Floats x) {
    using Pairs = typename Vector<std::uint64_t, Simd::kWidth / 2>::type;
    Pairs pairs;
    std::memcpy(&pairs, &x, sizeof pairs);
    pairs = (pairs >> 32) | (pairs << 32);
    std::memcpy(&x, &pairs, sizeof x);
    return x;
}

// A token's cosines and sines: of pairs (i, i + half) one an i; of neighbours one an element, the
// sine of the first with a minus.
class Angles {
   public:
    // direction: 1 to turn, -1 to turn back.
    FUSERL_INLINE Angles(const RotaryTables& tables, std::int64_t token, float direction)
        : half_(tables.half), interleaved_(tables.interleaved) {
        if (half_ == 0) return;
        const float* cos = tables.cos + tables.positions[token] * tables.cos_stride;
        const float* sin = tables.sin + tables.positions[token] * tables.sin_stride;
        if (interleaved_) {
            for (std::int64_t i = 0; i < half_; ++i) {
                cos_[2 * i] = cos_[2 * i + 1] = cos[i];
                sin_[2 * i] = -direction * sin[i];
                sin_[2 * i + 1] = direction * sin[i];
            }
            return;
        }
        each_vector_of(half_, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
            Simd::store(cos_ + i, Simd::load_some(cos + i, count));
            Simd::store(sin_ + i, Simd::load_some(sin + i, count) * direction);
        });
    }

    // Turn the head x(column, count) of `size` elements: its first 2 * half, and copy the others.
    template <typename Head, typename U>
    FUSERL_INLINE void turn(const Head& x, std::int64_t size, U* target) const {
        if (interleaved_)
            turn_neighbours(x, target);
        else
            turn_halves(x, target);
        const std::int64_t turned = 2 * half_;
        each_vector_of(size - turned, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
            Simd::store_some(target + turned + i, x(turned + i, count), count);
        });
    }

   private:
    template <typename Head, typename U>
    FUSERL_INLINE void turn_halves(const Head& x, U* target) const {
        each_vector_of(half_, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
            const Floats first = x(i, count), second = x(half_ + i, count);
            const Floats c = Simd::load(cos_ + i), s = Simd::load(sin_ + i);
            Simd::store_some(target + i, first * c - second * s, count);
            Simd::store_some(target + half_ + i, second * c + first * s, count);
        });
    }

    template <typename Head, typename U>
    FUSERL_INLINE void turn_neighbours(const Head& x, U* target) const {
        each_vector_of(2 * half_, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
            const Floats own = x(i, count);
            const Floats c = Simd::load(cos_ + i), s = Simd::load(sin_ + i);
            Simd::store_some(target + i, own * c + swapped(own) * s, count);
        });
    }

    std::int64_t half_;
    bool interleaved_;
    alignas(64) float cos_[kRoom];
    alignas(64) float sin_[kRoom];
};

// A head as it is.
template <typename T>
struct PlainHead {
    const T* row;

    FUSERL_INLINE Floats operator()(std::int64_t column, std::int64_t count) const {
        return Simd::load_some(row + column, count);
    }
};

// A head times its 1 / rms and the norm's weights.
template <typename T>
struct NormedHead {
    const T* row;
    const float* weights;
    float scale;

    FUSERL_INLINE Floats operator()(std::int64_t column, std::int64_t count) const {
        return Simd::load_some(row + column, count) * scale * Simd::load(weights + column);
    }
};

template <typename T>
FUSERL_INLINE float inverse_rms(const T* row, std::int64_t size, double eps) {
    Floats squares{};
    each_vector_of(size, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
        const Floats x = first_lanes(Simd::load_some(row + i, count), count);
        squares += x * x;
    });
    return static_cast<float>(1.0 / std::sqrt(Simd::lane_sum(squares) / size + eps));
}

// offset + weights as float32, zero past the last one to the end of a vector.
template <typename T>
void widen_weights(const T* weights, std::int64_t size, float offset, float* out) {
    each_vector_of(size, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
        Simd::store(out + i, first_lanes(offset + Simd::load_some(weights + i, count), count));
    });
}

// offset + weight of the query and of the key heads' norm, float32.
class Weights {
   public:
    Weights(const HeadNorm& norm, std::int64_t head_dim) {
        for (int kind = 0; kind < 2; ++kind) {
            present_[kind] = norm.weights[kind] != nullptr;
            if (!present_[kind]) continue;
            const void* from = norm.weights[kind];
            float* out = rows_[kind];
            switch (norm.dtypes[kind]) {
                case Dtype::kFloat32:
                    widen_weights(static_cast<const float*>(from), head_dim, norm.offset, out);
                    break;
                case Dtype::kBFloat16:
                    widen_weights(static_cast<const BFloat16*>(from), head_dim, norm.offset, out);
                    break;
                case Dtype::kFloat16:
                    widen_weights(static_cast<const Float16*>(from), head_dim, norm.offset, out);
                    break;
            }
        }
    }

    // Null for heads without a norm.
    const float* of(int kind) const { return present_[kind] ? rows_[kind] : nullptr; }

   private:
    bool present_[2];
    alignas(64) float rows_[2][kRoom];
};

template <typename T>
void forward_tokens(const Rotary& task, std::int64_t first, std::int64_t last) {
    const HeadSizes& sizes = task.sizes;
    const std::int64_t size = sizes.head_dim;
    const Weights weights(task.norm, size);
    for (std::int64_t token = first; token < last; ++token) {
        const T* head = static_cast<const T*>(task.qkv) + token * task.qkv_stride;
        const Angles angles(task.tables, token, 1.0f);
        const auto turn = [&](const HeadTarget& to, std::int64_t count, int kind, std::int64_t row,
                              std::int64_t offset) FUSERL_LAMBDA {
            T* target = static_cast<T*>(to.data) + row * to.row_stride + offset * to.offset_stride;
            const float* weight = weights.of(kind);
            for (std::int64_t i = 0; i < count; ++i, head += size, target += to.head_stride) {
                if (weight)
                    angles.turn(
                        NormedHead<T>{head, weight, inverse_rms(head, size, task.norm.eps)}, size,
                        target);
                else
                    angles.turn(PlainHead<T>{head}, size, target);
            }
        };
        turn(task.query, sizes.num_heads, 0, token, 0);
        const std::int64_t row = task.slots ? task.slots[token] : token;
        if (row < 0) continue;
        const std::int64_t offset = task.slots ? task.offsets[token] : 0;
        turn(task.key, sizes.num_kv_heads, 1, row, offset);
        const HeadTarget& to = task.value;
        T* target = static_cast<T*>(to.data) + row * to.row_stride + offset * to.offset_stride;
        for (std::int64_t i = 0; i < sizes.num_kv_heads; ++i, head += size, target += to.head_stride)
            std::memcpy(target, head, sizeof(T) * size);
    }
}

// The gradient of a head x that was normalised, from the gradient `grad` of weights * n(x); adds
// its share to the gradient of the weights.
template <typename T>
FUSERL_INLINE void norm_gradient(const T* x, const float* grad, const float* weights,
                                 std::int64_t size, double eps, T* out, float* grad_weights) {
    const float scale = inverse_rms(x, size, eps);
    Floats products{};
    each_vector_of(size, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
        const Floats n = Simd::load_some(x + i, count) * scale, g = Simd::load(grad + i);
        const Floats share = first_lanes(n * g, count);
        products += share * Simd::load(weights + i);
        Simd::store(grad_weights + i, Simd::load(grad_weights + i) + share);
    });
    const float mean = static_cast<float>(Simd::lane_sum(products) / size);
    each_vector_of(size, [&](std::int64_t i, std::int64_t count) FUSERL_LAMBDA {
        const Floats n = Simd::load_some(x + i, count) * scale;
        const Floats g = Simd::load(grad + i) * Simd::load(weights + i);
        Simd::store_some(out + i, (g - n * mean) * scale, count);
    });
}

template <typename T>
void backward_parts(const RotaryBackward& task, std::int64_t first, std::int64_t last,
                    float* partials) {
    const HeadSizes& sizes = task.sizes;
    const std::int64_t size = sizes.head_dim;
    const Weights weights(task.norm, size);
    alignas(64) float sums[2][kRoom];
    alignas(64) float turned[kRoom] = {};
    for (std::int64_t part = first; part < last; ++part) {
        std::memset(sums, 0, sizeof sums);
        const std::int64_t begin = part * kPartTokens;
        const std::int64_t end =
            begin + kPartTokens < sizes.num_tokens ? begin + kPartTokens : sizes.num_tokens;
        for (std::int64_t token = begin; token < end; ++token) {
            T* target = static_cast<T*>(task.grad_qkv) + token * sizes.row();
            std::int64_t column = 0;
            const Angles angles(task.tables, token, -1.0f);
            const auto each_head = [&](const HeadGradient& from, std::int64_t count,
                                       const auto& write) FUSERL_LAMBDA {
                if (!from.data) {
                    std::memset(target + column, 0, sizeof(T) * count * size);
                    column += count * size;
                    return;
                }
                const T* grad = static_cast<const T*>(from.data) + token * from.token_stride;
                for (std::int64_t i = 0; i < count; ++i, grad += from.head_stride, column += size)
                    write(grad);
            };
            const auto turn_back = [&](const HeadGradient& from, std::int64_t count, int kind)
                                       FUSERL_LAMBDA {
                const float* weight = weights.of(kind);
                each_head(from, count, [&](const T* grad) FUSERL_LAMBDA {
                    if (!weight) return angles.turn(PlainHead<T>{grad}, size, target + column);
                    const T* x =
                        static_cast<const T*>(task.qkv) + token * task.qkv_stride + column;
                    angles.turn(PlainHead<T>{grad}, size, turned);
                    norm_gradient(x, turned, weight, size, task.norm.eps, target + column,
                                  sums[kind]);
                });
            };
            turn_back(task.query, sizes.num_heads, 0);
            turn_back(task.key, sizes.num_kv_heads, 1);
            each_head(task.value, sizes.num_kv_heads, [&](const T* grad) FUSERL_LAMBDA {
                std::memcpy(target + column, grad, sizeof(T) * size);
            });
        }
        if (task.grad_weights)
            for (int kind = 0; kind < 2; ++kind)
                std::memcpy(partials + (2 * part + kind) * size, sums[kind],
                            sizeof(float) * size);
    }
}

inline void forward(const Rotary& task, std::int64_t first, std::int64_t last) {
    switch (task.dtype) {
        case Dtype::kFloat32: return forward_tokens<float>(task, first, last);
        case Dtype::kBFloat16: return forward_tokens<BFloat16>(task, first, last);
        case Dtype::kFloat16: return forward_tokens<Float16>(task, first, last);
    }
}

inline void backward(const RotaryBackward& task, std::int64_t first, std::int64_t last,
                     float* partials) {
    switch (task.dtype) {
        case Dtype::kFloat32: return backward_parts<float>(task, first, last, partials);
        case Dtype::kBFloat16: return backward_parts<BFloat16>(task, first, last, partials);
        case Dtype::kFloat16: return backward_parts<Float16>(task, first, last, partials);
    }
}

}  // namespace rotary

constexpr RotaryFunctions rotary_functions{rotary::forward, rotary::backward};

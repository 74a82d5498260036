#include "norms.h"

#include <algorithm>
#include <vector>

#include "kernel_functions.h"
#include "large_pages.h"
#include "parallel.h"

namespace fuserl {
namespace {

constexpr std::int64_t kMaxParts = 64;  // of the rows, each of which sums gradients of its own
constexpr std::int64_t kPartRows = 32;  // rows that are worth a part

// The vector as float32 with the offset added, in `room` unless it is that already.
const float* widened(const void* vector, Dtype dtype, float offset, std::int64_t size,
                     std::vector<float>& room) {
    if (vector == nullptr) return nullptr;
    if (dtype == Dtype::kFloat32 && offset == 0.0f) return static_cast<const float*>(vector);
    room.resize(static_cast<std::size_t>(size));
    kernel_functions().norms.widen(vector, dtype, offset, size, room.data());
    return room.data();
}

const float* scale_of(const Norm& norm, std::vector<float>& room) {
    return widened(norm.weight, norm.weight_dtype, norm.weight_offset, norm.hidden_size, room);
}

std::int64_t num_bytes(const Norm& norm) {
    return norm.num_rows * norm.hidden_size * size_of(norm.dtype);
}

}  // namespace

void norm_forward(const NormForward& task, int num_threads) {
    thread_local std::vector<float> scale_room, bias_room;
    const Norm& norm = task.norm;
    const float* scale = scale_of(norm, scale_room);
    const float* bias = widened(task.bias, task.bias_dtype, 0.0f, norm.hidden_size, bias_room);
    advise_large_pages(task.y, num_bytes(norm));
    if (task.residual) advise_large_pages(task.summed, num_bytes(norm));
    const auto forward = kernel_functions().norms.forward;
    parallel_rows(norm.num_rows, norm.hidden_size, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      forward(task, scale, bias, first, last);
                  });
}

void norm_backward(const NormBackward& task, int num_threads) {
    const Norm& norm = task.norm;
    std::vector<float> room;
    const float* scale = scale_of(norm, room);
    advise_large_pages(task.grad_x, num_bytes(norm));
    const auto backward = kernel_functions().norms.backward;
    if (task.grad_vectors == nullptr) {
        parallel_rows(norm.num_rows, norm.hidden_size, num_threads,
                      [&](std::int64_t first, std::int64_t last) {
                          backward(task, scale, nullptr, nullptr, first, last);
                      });
        return;
    }

    const std::int64_t wanted = (norm.num_rows + kPartRows - 1) / kPartRows;
    const std::int64_t num_parts = std::clamp<std::int64_t>(wanted, 1, kMaxParts);
    const std::int64_t part_rows = (norm.num_rows + num_parts - 1) / num_parts;
    const std::int64_t size = norm.num_stats() * norm.hidden_size;
    std::vector<double> sums(static_cast<std::size_t>(num_parts * size));
    parallel_rows(num_parts, part_rows * norm.hidden_size, num_threads,
                  [&](std::int64_t first, std::int64_t last) {
                      std::vector<float> run(static_cast<std::size_t>(size));
                      for (std::int64_t part = first; part < last; ++part)
                          backward(task, scale, run.data(), sums.data() + part * size,
                                   std::min(part * part_rows, norm.num_rows),
                                   std::min((part + 1) * part_rows, norm.num_rows));
                  });
    for (std::int64_t part = 1; part < num_parts; ++part)
        for (std::int64_t i = 0; i < size; ++i) sums[i] += sums[part * size + i];
    for (std::int64_t i = 0; i < size; ++i) task.grad_vectors[i] = static_cast<float>(sums[i]);
}

}  // namespace fuserl

// The GPU sampler on the CPU, for ctypes.

#include "../../../csrc/cuda/sampling.cu"

extern "C" void sample_tokens(const void* logits, int dtype, std::int64_t num_rows,
                              std::int64_t vocab_size, std::int64_t row_stride, double temperature,
                              std::int64_t top_k, double top_p, double min_p, std::uint64_t seed,
                              const std::int64_t* request_ids, const std::int64_t* positions,
                              std::int64_t* token_ids, float* logprobs, float* truncated_logprobs,
                              bool descending) {
    cuda_emulation::block.descending = descending;
    fuserl::cuda::sample_tokens(
        {logits, static_cast<fuserl::Dtype>(dtype), num_rows, vocab_size, row_stride, temperature,
         top_k, top_p, min_p, seed, request_ids, positions, token_ids, logprobs,
         truncated_logprobs},
        0, nullptr);
}

namespace {

void row_sum(const float* logits, int size, float temperature, float* sums) {
    using namespace fuserl::cuda;
    const Row<float, false> row(logits + std::int64_t{blockIdx.x} * size, size);
    const float scale = divide_approximate(kLog2E, temperature);
    LaneStatistics statistics;
    statistics.read<false>(row, scale);
    float lanes[kShare];
    statistics.sums(statistics.row_maximum(), scale, lanes);
    const float sum = sum_lanes(lanes);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace

// What the logarithm in a row's log-probabilities is taken of, of contiguous rows.
extern "C" void row_sums(const float* logits, int num_rows, int size, float temperature,
                         float* sums) {
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = dim3(static_cast<unsigned>(num_rows));
    configuration.blockDim = dim3(fuserl::cuda::kThreads);
    cudaLaunchKernelEx(&configuration, row_sum, logits, size, temperature, sums);
}

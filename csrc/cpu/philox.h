// Random bits from a counter: Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers:
// as easy as 1, 2, 3"), as kernels/fuserl_kernels/reference/sampling.py has it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSERL_HOST_DEVICE __host__ __device__
#else
#define FUSERL_HOST_DEVICE
#endif

namespace fuserl {

struct PhiloxWords {
    std::uint32_t word[4];
};

FUSERL_HOST_DEVICE inline PhiloxWords philox(PhiloxWords counter, std::uint32_t key_low,
                                             std::uint32_t key_high) {
    constexpr int kRounds = 10;
    auto& c = counter.word;
    for (int round = 0; round < kRounds; ++round) {
        const std::uint64_t first = std::uint64_t{0xD2511F53} * c[0];
        const std::uint64_t second = std::uint64_t{0xCD9E8D57} * c[2];
        counter = {{static_cast<std::uint32_t>(second >> 32) ^ c[1] ^ key_low,
                    static_cast<std::uint32_t>(second),
                    static_cast<std::uint32_t>(first >> 32) ^ c[3] ^ key_high,
                    static_cast<std::uint32_t>(first)}};
        key_low += 0x9E3779B9;
        key_high += 0xBB67AE85;
    }
    return counter;
}

// 53 bits; of the position the low 32 count.
FUSERL_HOST_DEVICE inline std::uint64_t uniform_bits(std::uint64_t seed, std::int64_t request_id,
                                                     std::int64_t position) {
    const auto request = static_cast<std::uint64_t>(request_id);
    const PhiloxWords bits = philox({{static_cast<std::uint32_t>(position),
                                      static_cast<std::uint32_t>(request),
                                      static_cast<std::uint32_t>(request >> 32), 0}},
                                    static_cast<std::uint32_t>(seed),
                                    static_cast<std::uint32_t>(seed >> 32));
    const std::uint64_t high = bits.word[0] >> 5, low = bits.word[1] >> 6;
    return (high << 26) | low;
}

// In [0, 1): those bits.
inline double uniform(std::uint64_t seed, std::int64_t request_id, std::int64_t position) {
    return static_cast<double>(uniform_bits(seed, request_id, position)) * 0x1p-53;
}

}  // namespace fuserl

// The pairwise loss of a reward model with its gradients and metrics: a number a pair, so a plain
// loop in double. Formula: kernels/fuserl_kernels/reference/pairwise.py.
#pragma once

#include <cstdint>

namespace fuserl {

struct PairwiseLoss {
    const double* chosen;    // [num_pairs], as the others
    const double* rejected;
    const double* margin;    // or null
    bool shared_margin;      // margin is [1]
    double center_coef;
    std::int64_t num_pairs;
    double* loss;            // [1]
    double* metrics;         // [5], in the order of METRICS
    double* grad_chosen;     // or null with grad_rejected
    double* grad_rejected;
};

void pairwise_loss(const PairwiseLoss& task);

}  // namespace fuserl

// How the KL divergence is estimated. Formulas: kernels/fuserl_kernels/reference/rewards.py.
#pragma once

namespace fuserl {

enum class KlEstimator { kK1, kK2, kK3, kAbs };

struct KlOptions {
    KlEstimator estimator;
    float clip;  // 0 for none
};

}  // namespace fuserl

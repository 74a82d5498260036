#include "pairwise_loss.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace fuserl {

void pairwise_loss(const PairwiseLoss& task) {
    const double count = static_cast<double>(std::max<std::int64_t>(1, task.num_pairs));
    double losses = 0.0, squares = 0.0, wins = 0.0, leads = 0.0, chosen = 0.0, rejected = 0.0;
    for (std::int64_t pair = 0; pair < task.num_pairs; ++pair) {
        const double lead = task.chosen[pair] - task.rejected[pair];
        const double total = task.chosen[pair] + task.rejected[pair];
        const double margin = task.margin ? task.margin[task.shared_margin ? 0 : pair] : 0.0;
        const double excess = lead - margin;
        const double small = std::exp(-std::abs(excess));  // nothing overflows
        losses += (excess < 0.0 ? -excess : 0.0) + std::log1p(small);
        squares += total * total;
        wins += lead > 0.0 ? 1.0 : (lead == 0.0 ? 0.5 : 0.0);
        leads += lead;
        chosen += task.chosen[pair];
        rejected += task.rejected[pair];
        if (!task.grad_chosen) continue;
        const double pull = (excess < 0.0 ? 1.0 : small) / (1.0 + small) / count;
        const double center = 2.0 * task.center_coef * total / count;
        task.grad_chosen[pair] = center - pull;
        task.grad_rejected[pair] = center + pull;
    }
    *task.loss = losses / count + task.center_coef * (squares / count);
    const double means[] = {wins / count, leads / count, chosen / count, rejected / count,
                            static_cast<double>(task.num_pairs)};
    std::copy(std::begin(means), std::end(means), task.metrics);
}

}  // namespace fuserl

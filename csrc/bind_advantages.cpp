// Python's view of cpu/advantages.h.

#include "bindings.h"

#include "cpu/advantages.h"

namespace {

using fuserl::KlEstimator;
using fuserl::MissingEos;

// Enumerators arrive by the names that the ops use.
KlEstimator estimator_of(const std::string& name) {
    if (name == "k1") return KlEstimator::kK1;
    if (name == "k2") return KlEstimator::kK2;
    if (name == "k3") return KlEstimator::kK3;
    if (name == "abs") return KlEstimator::kAbs;
    throw py::value_error("no KL estimator is named " + name);
}

MissingEos missing_eos_of(const std::string& name) {
    if (name.empty()) return MissingEos::kNone;
    if (name == "replace") return MissingEos::kReplace;
    if (name == "subtract") return MissingEos::kSubtract;
    throw py::value_error("no rule for a missing EOS is named " + name);
}

void kl_penalty_forward(Address logprobs, Address ref_logprobs, Size size,
                        const std::string& estimator, float kl_clip, Address out,
                        int num_threads) {
    const fuserl::KlPenalty task{at<const float>(logprobs), at<const float>(ref_logprobs), size,
                                 {estimator_of(estimator), kl_clip}, nullptr, at<float>(out),
                                 nullptr};
    const py::gil_scoped_release unlocked;
    fuserl::kl_penalty_forward(task, num_threads);
}

void kl_penalty_backward(Address logprobs, Address ref_logprobs, Size size,
                         const std::string& estimator, float kl_clip, Address grad,
                         Address grad_logprobs, Address grad_ref_logprobs, int num_threads) {
    const fuserl::KlPenalty task{at<const float>(logprobs), at<const float>(ref_logprobs), size,
                                 {estimator_of(estimator), kl_clip}, at<const float>(grad),
                                 at<float>(grad_logprobs), at<float>(grad_ref_logprobs)};
    const py::gil_scoped_release unlocked;
    fuserl::kl_penalty_backward(task, num_threads);
}

fuserl::Shaping shaping(Address scores, bool each_slot, Address logprobs, Address ref_logprobs,
                        Address loss_mask, Address has_eos, Size num_rows, Size num_slots,
                        const std::string& estimator, float kl_clip, float kl_coef, bool after,
                        Size limit, float score_clip, float score_scale,
                        const std::string& missing_eos, float missing_eos_penalty,
                        Address rewards, Address kl) {
    return {at<const float>(scores),
            each_slot,
            at<const float>(logprobs),
            at<const float>(ref_logprobs),
            at<const bool>(loss_mask),
            at<const bool>(has_eos),
            num_rows,
            num_slots,
            {estimator_of(estimator), kl_clip},
            kl_coef,
            after,
            limit,
            score_clip,
            score_scale,
            missing_eos_of(missing_eos),
            missing_eos_penalty,
            at<float>(rewards),
            at<float>(kl)};
}

void gae(Address rewards, Address values, Address loss_mask, Address value_mask, Size num_rows,
         Size num_slots, Address starts, double gamma, double gae_lambda, bool carry,
         Address advantages, Address returns, int num_threads) {
    fuserl::gae({at<const float>(rewards), at<const float>(values), at<const bool>(loss_mask),
                 at<const bool>(value_mask), num_rows, num_slots, at<const std::int64_t>(starts),
                 fuserl::Discount(gamma, gae_lambda, carry), at<float>(advantages),
                 at<float>(returns)},
                num_threads);
}

void masked_moments(Address x, Address mask, Size size, Address moments, int num_threads) {
    *at<fuserl::Moments>(moments) =
        fuserl::masked_moments(at<const float>(x), at<const bool>(mask), size, num_threads);
}

void masked_whiten(Address x, Address mask, Size size, Address moments, Size num_parts,
                   bool shift_mean, bool unbiased, Address out, int num_threads) {
    fuserl::masked_whiten({at<const float>(x), at<const bool>(mask), size,
                           at<const fuserl::Moments>(moments), num_parts, shift_mean, unbiased,
                           at<float>(out)},
                          num_threads);
}

void rewards_to_advantages(const fuserl::Shaping& shaping, Address values, double gamma,
                           double gae_lambda, bool carry, bool whiten, bool whiten_rewards,
                           bool unbiased, Address advantages, Address returns, int num_threads) {
    fuserl::rewards_to_advantages(
        {shaping, at<const float>(values), fuserl::Discount(gamma, gae_lambda, carry), whiten,
         whiten_rewards, unbiased, at<float>(advantages), at<float>(returns)},
        num_threads);
}

}  // namespace

void bind_advantages(py::module_& module) {
    module.def("kl_penalty_forward", &kl_penalty_forward, py::kw_only(), "logprobs"_a,
               "ref_logprobs"_a, "size"_a, "estimator"_a, "kl_clip"_a, "out"_a, "num_threads"_a);
    module.def("kl_penalty_backward", &kl_penalty_backward, py::kw_only(), "logprobs"_a,
               "ref_logprobs"_a, "size"_a, "estimator"_a, "kl_clip"_a, "grad"_a,
               "grad_logprobs"_a, "grad_ref_logprobs"_a, "num_threads"_a);
    py::class_<fuserl::Shaping>(module, "Shaping")
        .def(py::init(&shaping), py::kw_only(), "scores"_a, "each_slot"_a, "logprobs"_a,
             "ref_logprobs"_a, "loss_mask"_a, "has_eos"_a, "num_rows"_a, "num_slots"_a,
             "estimator"_a, "kl_clip"_a, "kl_coef"_a, "after"_a, "limit"_a, "score_clip"_a,
             "score_scale"_a, "missing_eos"_a, "missing_eos_penalty"_a, "rewards"_a, "kl"_a);
    module.def("shape_rewards", &fuserl::shape_rewards, "shaping"_a, py::kw_only(),
               "num_threads"_a, Unlocked());
    module.def("gae", &gae, py::kw_only(), "rewards"_a, "values"_a, "loss_mask"_a, "value_mask"_a,
               "num_rows"_a, "num_slots"_a, "starts"_a, "gamma"_a, "gae_lambda"_a, "carry"_a,
               "advantages"_a, "returns"_a, "num_threads"_a, Unlocked());
    module.def("masked_moments", &masked_moments, py::kw_only(), "x"_a, "mask"_a, "size"_a,
               "moments"_a, "num_threads"_a, Unlocked());
    module.def("masked_whiten", &masked_whiten, py::kw_only(), "x"_a, "mask"_a, "size"_a,
               "moments"_a, "num_parts"_a, "shift_mean"_a, "unbiased"_a, "out"_a, "num_threads"_a,
               Unlocked());
    module.def("rewards_to_advantages", &rewards_to_advantages, "shaping"_a, py::kw_only(),
               "values"_a, "gamma"_a, "gae_lambda"_a, "carry"_a, "whiten"_a, "whiten_rewards"_a,
               "unbiased"_a, "advantages"_a, "returns"_a, "num_threads"_a, Unlocked());
}

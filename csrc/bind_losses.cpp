// Python's view of cpu/losses.h and cpu/pairwise_loss.h.

#include <pybind11/stl.h>

#include "bindings.h"

#include "cpu/losses.h"
#include "cpu/pairwise_loss.h"

namespace {

using fuserl::Aggregation;
using fuserl::Clip;
using fuserl::Correction;
using fuserl::KlEstimator;
using fuserl::Level;
using fuserl::PolicyLoss;
using fuserl::ValueLoss;
using Denominator = std::optional<double>;

PolicyLoss policy_of(Address new_logprobs, Address logprobs, Address advantages,
                     bool sequence_advantages, Address loss_mask, Address ref_logprobs,
                     Address entropy, Address rollout_logprobs, Denominator denominator,
                     Level ratio_level, Clip clip, double clip_low, double clip_high,
                     double dual_clip, double gate_pos, double gate_neg, double gate_rate_pos,
                     double gate_rate_neg, double log_ratio_clip, Aggregation aggregation,
                     double kl_coef, KlEstimator kl_estimator, float kl_clip, double entropy_coef,
                     Correction correction, Level correction_level, double correction_low,
                     double correction_high, Address grad_logprobs, Address grad_entropy) {
    return {at<const float>(new_logprobs),
            at<const float>(logprobs),
            at<const float>(advantages),
            sequence_advantages,
            at<const bool>(loss_mask),
            at<const float>(ref_logprobs),
            at<const float>(entropy),
            at<const float>(rollout_logprobs),
            denominator,
            ratio_level,
            clip,
            clip_low,
            clip_high,
            dual_clip,
            gate_pos,
            gate_neg,
            gate_rate_pos,
            gate_rate_neg,
            log_ratio_clip,
            aggregation,
            kl_coef,
            {kl_estimator, kl_clip},
            entropy_coef,
            correction,
            correction_level,
            correction_low,
            correction_high,
            at<float>(grad_logprobs),
            at<float>(grad_entropy)};
}

ValueLoss value_of(Address new_values, Address values, Address returns, Address loss_mask,
                   double clip_range, double coef, Denominator denominator, Address grad_values) {
    return {at<const float>(new_values), at<const float>(values), at<const float>(returns),
            at<const bool>(loss_mask),   clip_range,              coef,
            denominator,                 at<float>(grad_values)};
}

void losses(const PolicyLoss* policy, const ValueLoss* value, Size num_tokens, Size num_sequences,
            Address cu_seqlens, bool scale_gradients, Address loss, Address metrics, Address scales,
            int num_threads) {
    fuserl::policy_and_value_losses(
        {policy, value, num_tokens, num_sequences, at<const std::int64_t>(cu_seqlens),
         scale_gradients},
        at<float>(loss), at<float>(metrics), at<float>(scales), num_threads);
}

void pairwise(Address chosen, Address rejected, Address margin, bool shared_margin,
              double center_coef, Size num_pairs, Address loss, Address metrics,
              Address grad_chosen, Address grad_rejected) {
    fuserl::pairwise_loss({at<const double>(chosen), at<const double>(rejected),
                           at<const double>(margin), shared_margin, center_coef, num_pairs,
                           at<double>(loss), at<double>(metrics), at<double>(grad_chosen),
                           at<double>(grad_rejected)});
}

// The names of the options, as Python's strings spell them.
void bind_options(py::module_& module) {
    py::enum_<Level>(module, "Level")
        .value("token", Level::kToken)
        .value("sequence_sum", Level::kSequenceSum)
        .value("sequence_mean", Level::kSequenceMean)
        .value("sequence_mean_token", Level::kSequenceMeanToken);
    py::enum_<Clip>(module, "Clip")
        .value("ppo", Clip::kPpo)
        .value("cispo", Clip::kCispo)
        .value("sapo", Clip::kSapo)
        .value("vespo", Clip::kVespo)
        .value("none", Clip::kNone);
    py::enum_<Aggregation>(module, "Aggregation")
        .value("token_mean", Aggregation::kTokenMean)
        .value("sequence_mean", Aggregation::kSequenceMean)
        .value("sequence_sum", Aggregation::kSequenceSum);
    py::enum_<KlEstimator>(module, "KlEstimator")
        .value("k1", KlEstimator::kK1)
        .value("k2", KlEstimator::kK2)
        .value("k3", KlEstimator::kK3)
        .value("abs", KlEstimator::kAbs);
    py::enum_<Correction>(module, "Correction")
        .value("none", Correction::kNone)
        .value("truncate", Correction::kTruncate)
        .value("mask", Correction::kMask)
        .value("reject", Correction::kReject);
}

}  // namespace

void bind_losses(py::module_& module) {
    bind_options(module);
    py::class_<PolicyLoss>(module, "PolicyLoss")
        .def(py::init(&policy_of), py::kw_only(), "new_logprobs"_a, "logprobs"_a, "advantages"_a,
             "sequence_advantages"_a, "loss_mask"_a, "ref_logprobs"_a, "entropy"_a,
             "rollout_logprobs"_a, "denominator"_a, "ratio_level"_a, "clip"_a, "clip_low"_a,
             "clip_high"_a, "dual_clip"_a, "gate_pos"_a, "gate_neg"_a, "gate_rate_pos"_a,
             "gate_rate_neg"_a, "log_ratio_clip"_a, "aggregation"_a, "kl_coef"_a,
             "kl_estimator"_a, "kl_clip"_a, "entropy_coef"_a, "correction"_a, "correction_level"_a,
             "correction_low"_a, "correction_high"_a, "grad_logprobs"_a, "grad_entropy"_a);
    py::class_<ValueLoss>(module, "ValueLoss")
        .def(py::init(&value_of), py::kw_only(), "new_values"_a, "values"_a, "returns"_a,
             "loss_mask"_a, "clip_range"_a, "coef"_a, "denominator"_a, "grad_values"_a);
    module.def("policy_and_value_losses", &losses, py::kw_only(), "policy"_a, "value"_a,
               "num_tokens"_a, "num_sequences"_a, "cu_seqlens"_a, "scale_gradients"_a, "loss"_a,
               "metrics"_a, "scales"_a, "num_threads"_a, Unlocked());
    module.def("pairwise_loss", &pairwise, py::kw_only(), "chosen"_a, "rejected"_a, "margin"_a,
               "shared_margin"_a, "center_coef"_a, "num_pairs"_a, "loss"_a, "metrics"_a,
               "grad_chosen"_a, "grad_rejected"_a, Unlocked());
}

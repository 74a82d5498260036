"""The phase that learns: epochs of minibatches over one rollout, accumulated over microbatches.

Every loss is divided by the token count of its whole optimizer step, so how rows are cut into
microbatches changes memory and nothing else.
"""

import dataclasses

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.algorithms import ALGORITHMS
from fuserl.batch import ShapedBatch
from fuserl.config import RLConfig
from fuserl.conventions import conventions
from fuserl.metrics import WeightedMean
from fuserl.model.heads import Critic, LanguageModel
from fuserl.optimizer import Optimizer
from fuserl.sampling_gap import LogRatioEnds, gap_of_step
from fuserl.sequences import Sequences, completion_values
from fuserl.shaping import whitened
from fuserl_kernels.presets import Preset
from fuserl_kernels.reference.policy import LOG_RATIO
from fuserl_kernels.reference.value import LEAST_SPREAD

LOGGED_AS = {
    "policy/loss": "loss/policy_avg",
    "policy/approxkl": "policy/approxkl_avg",
    "policy/clipfrac": "policy/clipfrac_avg",
    "kl": "loss/kl_avg",
    "entropy": "policy/entropy_avg",
    "value/loss": "loss/value_avg",
    "value/clipfrac": "val/clipfrac_avg",
    "value/explained_variance": "val/explained_variance",
}
"""The losses' metrics under the names the field logs them by."""


def update(
    policy: LanguageModel,
    critic: Critic | None,
    optimizer: Optimizer,
    batch: ShapedBatch,
    config: RLConfig,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Train on one shaped batch. Returns metrics as 0-d tensors: means over all updates, under
    `first/` those of the first one, where the ratio must be 1, and, where ratios start from the
    sampler, under `sampling/` the gap between sampler and trainer, of the first one's tokens: no
    weight has moved by then.

    seed: of the order of the rows, which is drawn anew for each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = WeightedMean()
    first: dict[str, Tensor] = {}
    for _ in range(config.passes):
        order = torch.randperm(len(batch), generator=generator).to(batch.prompts.device)
        for rows in order.tensor_split(config.num_minibatches):
            found = _step(policy, critic, optimizer, batch.select(rows), config)
            step = {
                LOGGED_AS.get(name, name): value
                for name, value in found.items()
                if name not in LOG_RATIO
            }
            if not first:
                first = {f"first/{name}": value for name, value in step.items()}
                first |= gap_of_step(found) if batch.rollout_logprobs is None else {}
            totals.add(step, weight=1.0)
    return {**totals.mean(), **first}


def _step(
    policy: LanguageModel,
    critic: Critic | None,
    optimizer: Optimizer,
    batch: ShapedBatch,
    config: RLConfig,
) -> dict[str, Tensor]:
    """One optimizer step over a minibatch."""
    preset, penalty = conventions(config), config.kl
    if critic is not None and preset.whitening_scope == "minibatch":
        batch = whitened(batch, preset)
    if batch.importance_weights is not None:
        batch = dataclasses.replace(batch, advantages=batch.advantages * batch.importance_weights)
    policy_tokens = batch.loss_mask.sum()
    value_tokens = _value_loss_mask(batch, preset).sum()
    shares_trunk = critic is not None and critic.trunk is policy.trunk
    totals = WeightedMean()
    log_ratios = LogRatioEnds()
    predicted: list[Tensor] = []
    aimed: list[Tensor] = []
    for rows in torch.arange(len(batch), device=batch.prompts.device).split(config.microbatch_size):
        part = batch.select(rows)
        sequences = Sequences.of_batch(part)
        hidden = sequences.hidden_states(policy.trunk)
        ref_logprobs = None
        if penalty.loss_coef:
            assert part.ref_logprobs is not None
            ref_logprobs = sequences.by_token(part.ref_logprobs)
        loss, metrics = fk.linear_policy_loss(
            hidden.index_select(0, sequences.before),
            policy.output_weight,
            sequences.completion_ids,
            sequences.by_token(part.logprobs),
            sequences.by_token(part.advantages),
            sequences.by_token(part.loss_mask),
            bias=policy.output_bias,
            softcap=policy.config.final_softcap,
            temperature=config.temperature,
            denominator=policy_tokens,
            ref_logprobs=ref_logprobs,
            clip=ALGORITHMS[config.algorithm].clip,
            kl_coef=penalty.loss_coef,
            entropy_coef=config.entropy_coef,
            **preset.policy(penalty.estimator),
        )
        if not shares_trunk:
            loss.backward()  # before the critic's forward: one graph at a time
        around_one = metrics["val/ratio_var"] + (metrics["val/ratio"] - 1).square()
        metrics["val/ratio_var"] = around_one  # a second moment adds up; see below
        totals.add(metrics, weight=part.loss_mask.sum())
        log_ratios.add(metrics, part.loss_mask)
        if critic is not None:
            assert part.values is not None
            width = part.completions.shape[1]
            values = completion_values(critic, sequences, width, hidden if shares_trunk else None)
            learned = _value_loss_mask(part, preset)
            value_loss, metrics = fk.value_loss(
                values,
                part.values,
                part.returns,
                learned,
                denominator=value_tokens,
                **preset.value(),
            )
            value_loss = config.vf_coef * value_loss
            (loss + value_loss if shares_trunk else value_loss).backward()
            totals.add(metrics, weight=learned.sum())
            predicted.append(values.detach()[learned])
            aimed.append(part.returns[learned])
    found = {**totals.mean(), **log_ratios.found(), "num_tokens": policy_tokens.float()}
    # Means of microbatches' variances are no variance: these two are made from the whole step.
    found["val/ratio_var"] = found["val/ratio_var"] - (found["val/ratio"] - 1).square()
    if predicted:
        found["value/explained_variance"] = explained_variance(
            torch.cat(predicted), torch.cat(aimed)
        )
    return {**found, **optimizer.step()}


def _value_loss_mask(batch: ShapedBatch, preset: Preset) -> Tensor:
    return batch.value_mask if preset.value_loss_mask == "value" else batch.loss_mask


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), 0-d; 0 where the returns do not vary."""
    if len(returns) == 0:
        return returns.new_zeros(())
    wide = returns.double()
    variance = wide.var(correction=0)
    varies = variance > LEAST_SPREAD * wide.square().mean()
    unexplained = (wide - values).var(correction=0)
    return torch.where(varies, 1 - unexplained / variance, 0.0).to(returns.dtype)

"""The least that each phase of a step of RL multiplies and moves, and the time that follows.

A phase is some parts, one after another; the limit of each is the larger of its flops at the
measured rate of products and its bytes at the measured bandwidth, as in decode_steps.py.

    rollout    prompts: products and attention, each once for all its samples; weights read once
               products of the decode steps: layers for all new tokens but the last of a completion,
               the head for all; weights read once a step, of as few steps as the slots allow
               attention of the decode steps: keys and values of every step read once, a prompt's
               once for all its samples
    score      reward model, reference and critic, one after another: weights read once a microbatch
    recompute  the policy likewise
    shape      [B, T] numbers read and written once
    update     forward and backward: weights read twice and gradients written once a microbatch
               optimizer: gradient, master and moments read, all but the gradient written, weights
               that are copies written too

Activations are left out, since a kernel may keep them on the chip. The flops are those of
model/flops.py. What stays in a cache of the processor may be faster than the bandwidth of memory:
models of a few megabytes can pass 100 %.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from fuserl.bench.case import Cost
from fuserl.config import RLConfig
from fuserl.model.decoder import Decoder
from fuserl.model.flops import (
    Lengths,
    Pass,
    decode_attention_flops,
    last_tokens_flops,
    layer_weights,
    pass_of,
    prefill_flops,
    update_passes,
    visible_pairs,
)
from fuserl.model.heads import Critic, LanguageModel
from fuserl.rewards import ModelReward
from fuserl.stages.rl_step import Learner

PhaseCosts = Mapping[str, Sequence[Cost]]

_FP32 = 4
_ADAMW_BYTES = 7 * _FP32
"""Of one weight: gradient, master and two moments read, master and moments written."""


def phase_costs(learner: Learner, lengths: Lengths, num_slots: int) -> PhaseCosts | None:
    """Of one step, by phase; None where a model is not of our own decoder, whose products are all
    that is known. num_slots: completions that the rollout sampled at a time."""
    config, policy, critic = learner.config, learner.policy, learner.models.critic
    judge = learner.models.reward.model if isinstance(learner.models.reward, ModelReward) else None
    scorers: list[LanguageModel | Critic | None] = [judge, learner.models.reference, critic]
    models = [policy, *(model for model in scorers if model is not None)]
    if not all(isinstance(model.trunk, Decoder) for model in models):
        return None
    num_bytes = policy.trunk.dtype.itemsize
    reads = num_bytes * _num_microbatches(len(lengths.prompts), config)

    def forward(model: LanguageModel | Critic) -> Cost:
        one = pass_of(model)
        return Cost(reads * one.num_weights, one.forward_flops(lengths))

    costs = {
        "rollout": rollout_costs(pass_of(policy), lengths, num_slots, num_bytes),
        "score": [forward(model) for model in models[1:]],
        "shape": [_shape_cost(lengths, 1 + sum(model is not None for model in scorers[1:]))],
        "update": update_costs(policy, critic, lengths, config),
    }
    if config.old_logprobs == "recomputed":
        costs["recompute"] = [forward(policy)]
    return costs


def rollout_costs(policy: Pass, lengths: Lengths, num_slots: int, weight_bytes: int) -> list[Cost]:
    """weight_bytes: of one weight, one key and one value."""
    config, tokens = policy.config, sum(lengths.completions)
    layers = config.num_layers * layer_weights(config)
    prefill = Cost(weight_bytes * layers, prefill_flops(config, lengths))
    num_steps = max(*lengths.completions, -(-tokens // num_slots))
    computed = tokens - len(lengths.completions)
    flops = 2 * (layers * computed + policy.head_weights * tokens)
    if policy.from_kept:
        flops += last_tokens_flops(policy, lengths)
    read = (num_steps - 1) * layers + num_steps * policy.head_weights
    kv_bytes = 2 * weight_bytes * config.num_kv_heads * config.head_dim
    return [
        prefill,
        Cost(weight_bytes * read, flops),
        Cost(kv_bytes * _keys_read(policy, lengths), decode_attention_flops(config, lengths)),
    ]


def _keys_read(policy: Pass, lengths: Lengths) -> int:
    """Keys of all steps and layers, a prompt's once a step for all its samples."""
    config, num_samples = policy.config, lengths.num_samples
    total = 0
    for layer in range(config.num_layers):
        window = config.window_of(layer)
        own = [visible_pairs(completion - 1, window) for completion in lengths.completions]
        total += sum(own)
        for first in range(0, len(own), num_samples):
            group = range(first, first + num_samples)
            longest = max(group, key=lambda row: lengths.completions[row])
            prompt, completion = lengths.prompts[longest], lengths.completions[longest]
            seen = visible_pairs(prompt + completion - 1, window) - visible_pairs(prompt, window)
            total += seen - own[longest]
    return total


def update_costs(
    policy: LanguageModel, critic: Critic | None, lengths: Lengths, config: RLConfig
) -> list[Cost]:
    """The passes, then the optimizer's steps."""
    num_microbatches = _num_microbatches(len(lengths.prompts), config, config.num_minibatches)
    passes = update_passes(policy, critic)
    flops = sum(one.forward_flops(lengths) + one.backward_flops(lengths) for one in passes)
    modules: list[nn.Module] = [policy] if critic is None else [policy, critic]
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    weights = policy.trunk.dtype.itemsize * sum(one.num_weights for one in passes)
    moved = num_microbatches * (2 * weights + _FP32 * num_trained)
    copies = sum(p.nbytes for p in trained if p.dtype.itemsize < _FP32)
    stepped = config.num_minibatches * (_ADAMW_BYTES * num_trained + copies)
    return [Cost(config.passes * moved, config.passes * flops), Cost(config.passes * stepped, 0)]


def _num_microbatches(num_rows: int, config: RLConfig, num_minibatches: int = 1) -> int:
    """Of one pass over the rows, cut into minibatches first as update() does."""
    short, longer = divmod(num_rows, num_minibatches)
    sizes = [short + 1] * longer + [short] * (num_minibatches - longer)
    return sum(-(-size // config.microbatch_size) for size in sizes)


def _shape_cost(lengths: Lengths, num_read: int) -> Cost:
    """num_read: arrays of [B, T] fp32 that come in beside the mask; rewards, KL, advantages and
    returns go out."""
    return Cost((_FP32 * (num_read + 4) + 1) * sum(lengths.completions), 0)

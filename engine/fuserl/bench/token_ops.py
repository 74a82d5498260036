"""The ops between scores and gradients in the benchmark's table: on [B, T], and on pairs."""

from typing import Any

import torch

import fuserl_kernels as fk
from fuserl.bench import token_problems, token_rivals
from fuserl.bench.case import Case
from fuserl.bench.op import BASELINE, Op, Sizes
from fuserl.bench.problem import CLIP_RANGE
from fuserl.bench.rivals import Function
from fuserl.bench.truth import Tensors


def _gae(case: Case) -> Function:
    def run(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        return fk.gae(
            rewards,
            values,
            mask,
            gamma=token_problems.GAMMA,
            gae_lambda=token_problems.GAE_LAMBDA,
        )

    return run


def _rewards_to_advantages(case: Case) -> Function:
    def run(
        scores: torch.Tensor,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
    ) -> Tensors:
        return fk.rewards_to_advantages(
            scores,
            logprobs,
            ref_logprobs,
            values,
            mask,
            kl_coef=token_problems.REWARD_KL_COEF,
            gamma=token_problems.GAMMA,
            gae_lambda=token_problems.GAE_LAMBDA,
            whiten=True,
            unbiased=True,
        )

    return run


def _shape_rewards(case: Case) -> Function:
    coefficient = token_problems.REWARD_KL_COEF
    return lambda *arguments: fk.shape_rewards(*arguments, kl_coef=coefficient)


def _discounted_returns(case: Case) -> Function:
    return lambda rewards, mask: (fk.discounted_returns(rewards, mask, gamma=token_problems.GAMMA),)


def _masked_moments(case: Case) -> Function:
    def run(x: torch.Tensor, mask: torch.Tensor) -> Tensors:
        number, mean, squares = fk.masked_moments(x, mask).unbind()
        return (torch.stack((number, mean, squares / number)),)

    return run


def _value_loss(case: Case) -> Function:
    return lambda *arguments: (fk.value_loss(*arguments, clip_range=CLIP_RANGE)[0],)


def _masked_whiten(case: Case) -> Function:
    return lambda x, mask: (fk.masked_whiten(x, mask, unbiased=True),)


def _kl_penalty(case: Case) -> Function:
    return lambda logprobs, ref_logprobs: (fk.kl_penalty(logprobs, ref_logprobs, "k3"),)


_POLICY_METRICS = ("policy/approxkl", "policy/clipfrac", "val/ratio")


def _policy_loss(case: Case) -> Function:
    def run(
        new_logprobs: torch.Tensor,
        logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
    ) -> Tensors:
        loss, metrics = fk.policy_loss(
            new_logprobs, logprobs, advantages, mask, clip_range=CLIP_RANGE
        )
        return (loss, *(metrics[name] for name in _POLICY_METRICS if case.with_metrics))

    return run


def _ppo_loss(case: Case) -> Function:
    def run(
        new_logprobs: torch.Tensor,
        new_values: torch.Tensor,
        logprobs: torch.Tensor,
        advantages: torch.Tensor,
        values: torch.Tensor,
        returns: torch.Tensor,
        mask: torch.Tensor,
    ) -> Tensors:
        loss, metrics = fk.ppo_loss(
            new_logprobs,
            logprobs,
            advantages,
            new_values,
            values,
            returns,
            mask,
            vf_coef=token_problems.VF_COEF,
            clip_range=CLIP_RANGE,
            value_clip_range=CLIP_RANGE,
        )
        names = (*_POLICY_METRICS, "value/clipfrac")
        return (loss, *(metrics[name] for name in names if case.with_metrics))

    return run


def _pairwise_loss(case: Case) -> Function:
    return lambda chosen, rejected: (fk.pairwise_loss(chosen, rejected)[0],)


_TOKENS = Sizes(num_sequences=512, num_slots=1024)
_ON_TOKENS: dict[str, Any] = {
    "defaults": {"cpu": _TOKENS, "cuda": _TOKENS},
    "dtypes": {
        "cpu": "fp32",
        "cuda": "fp32",
    },  # trainers keep what is one number a token in float32
}

TOKEN_OPS: dict[str, Op] = {
    "gae": Op(
        problem=token_problems.gae_problem,
        cost=token_problems.gae_cost,
        ours=_gae,
        rivals={
            BASELINE: token_rivals.gae_loop,
            "torch-scan": token_rivals.gae_scan,
            "torch-compile": token_rivals.compiled(token_rivals.gae_scan),
        },
        passes=("forward",),
        has_gradient=False,
        **_ON_TOKENS,
    ),
    "rewards_to_advantages": Op(
        problem=token_problems.advantages_problem,
        cost=token_problems.advantages_cost,
        ours=_rewards_to_advantages,
        rivals={
            BASELINE: token_rivals.advantages_loop,
            "torch-scan": token_rivals.advantages_scan,
            "torch-compile": token_rivals.compiled(token_rivals.advantages_scan),
        },
        passes=("forward",),
        has_gradient=False,
        **_ON_TOKENS,
    ),
    "discounted_returns": Op(
        problem=token_problems.returns_problem,
        cost=token_problems.returns_cost,
        ours=_discounted_returns,
        rivals={
            BASELINE: token_rivals.returns_loop,
            "torch-scan": token_rivals.returns_scan,
            "torch-compile": token_rivals.compiled(token_rivals.returns_scan),
        },
        passes=("forward",),
        has_gradient=False,
        **_ON_TOKENS,
    ),
    "shape_rewards": Op(
        problem=token_problems.shaping_problem,
        cost=token_problems.shaping_cost,
        ours=_shape_rewards,
        rivals={
            BASELINE: token_rivals.shaping_eager,
            "torch-compile": token_rivals.compiled(token_rivals.shaping_eager),
        },
        passes=("forward",),
        has_gradient=False,
        **_ON_TOKENS,
    ),
    "masked_moments": Op(
        problem=token_problems.moments_problem,
        cost=token_problems.moments_cost,
        ours=_masked_moments,
        rivals={
            BASELINE: token_rivals.moments_eager,
            "torch-compile": token_rivals.compiled(token_rivals.moments_eager),
        },
        passes=("forward",),
        has_gradient=False,
        **_ON_TOKENS,
    ),
    "masked_whiten": Op(
        problem=token_problems.whiten_problem,
        cost=token_problems.whiten_cost,
        ours=_masked_whiten,
        rivals={
            BASELINE: token_rivals.whiten_eager,
            "torch-compile": token_rivals.compiled(token_rivals.whiten_eager),
        },
        passes=("forward",),
        has_gradient=False,
        **_ON_TOKENS,
    ),
    "kl_penalty": Op(
        problem=token_problems.kl_problem,
        cost=token_problems.kl_cost,
        ours=_kl_penalty,
        rivals={
            BASELINE: token_rivals.kl_eager,
            "torch-compile": token_rivals.compiled(token_rivals.kl_eager),
        },
        **_ON_TOKENS,
    ),
    "policy_loss": Op(
        problem=token_problems.policy_loss_problem,
        cost=token_problems.policy_loss_cost,
        ours=_policy_loss,
        rivals={
            BASELINE: token_rivals.policy_eager,
            "torch-compile": token_rivals.compiled(token_rivals.policy_eager),
        },
        passes=("forward_backward",),
        options={"with_metrics": False},
        **_ON_TOKENS,
    ),
    "value_loss": Op(
        problem=token_problems.value_loss_problem,
        cost=token_problems.value_loss_cost,
        ours=_value_loss,
        rivals={
            BASELINE: token_rivals.value_eager,
            "torch-compile": token_rivals.compiled(token_rivals.value_eager),
        },
        passes=("forward_backward",),
        **_ON_TOKENS,
    ),
    "ppo_loss": Op(
        problem=token_problems.ppo_problem,
        cost=token_problems.ppo_cost,
        ours=_ppo_loss,
        rivals={
            BASELINE: token_rivals.ppo_eager,
            "torch-compile": token_rivals.compiled(token_rivals.ppo_eager),
        },
        passes=("forward_backward",),
        options={"with_metrics": False},
        **_ON_TOKENS,
    ),
    "pairwise_loss": Op(
        problem=token_problems.pairwise_problem,
        cost=token_problems.pairwise_cost,
        ours=_pairwise_loss,
        rivals={
            BASELINE: token_rivals.pairwise_eager,
            "torch-compile": token_rivals.compiled(token_rivals.pairwise_eager),
        },
        defaults={"cpu": Sizes(num_rows=512), "cuda": Sizes(num_rows=512)},
        dtypes={"cpu": "fp32", "cuda": "fp32"},
        passes=("forward_backward",),
    ),
}

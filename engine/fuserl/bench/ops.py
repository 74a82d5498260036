"""The table of benchmarked ops: a new op joins by one entry.

A provider is named `fuserl-<implementation>` or after its library. The first rival of each op is
plain torch, to which the others' times are compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import fuserl_kernels as fk
from fuserl.bench import (
    attention,
    glu,
    norms,
    rivals,
    rotary,
    sampling,
    token_problems,
    token_rivals,
)
from fuserl.bench.case import PASSES, Case, Cost, linear_cost, rows_cost
from fuserl.bench.problem import (
    CLIP_RANGE,
    KL_COEF,
    PolicyBatch,
    Problem,
    logprobs_problem,
    policy_problem,
)
from fuserl.bench.rivals import Function, Make, Unavailable, with_loss
from fuserl.bench.truth import Tensors
from fuserl_kernels import backend
from fuserl_kernels.registration import tables


@dataclass(frozen=True, slots=True)
class Provider:
    """backend: the implementation of ours that runs inside, forward and backward."""

    name: str
    make: Make
    backend: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.backend is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a case; 0 for a dimension that the op does not have."""

    num_rows: int = 0
    vocab_size: int = 0
    hidden_size: int = 0
    num_sequences: int = 0
    num_slots: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """defaults, dtypes: by device. passes: what "all" times. options: fields of Case that the op
    takes, with what they are unless asked for."""

    problem: Callable[[Case], Problem]
    cost: Callable[[Case], Cost]
    ours: Make
    rivals: Mapping[str, Make]
    defaults: Mapping[str, Sizes]
    dtypes: Mapping[str, str] = field(default_factory=lambda: {"cpu": "fp32", "cuda": "bf16"})
    passes: tuple[str, ...] = PASSES
    has_gradient: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


BASELINE = "torch"


def _token_logprobs(case: Case) -> Function:
    def run(logits: torch.Tensor, token_ids: torch.Tensor) -> Tensors:
        if case.with_entropy:
            return fk.token_logprobs(
                logits, token_ids, return_entropy=True, inplace_grad=case.inplace_grad
            )
        return (fk.token_logprobs(logits, token_ids, inplace_grad=case.inplace_grad),)

    return run


def _linear_token_logprobs(case: Case) -> Function:
    def run(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor) -> Tensors:
        if case.with_entropy:
            return fk.linear_token_logprobs(hidden, weight, token_ids, return_entropy=True)
        return (fk.linear_token_logprobs(hidden, weight, token_ids),)

    return run


def _linear_policy_loss(case: Case) -> Function:
    def run(hidden: torch.Tensor, weight: torch.Tensor, batch: PolicyBatch) -> Tensors:
        loss, _ = fk.linear_policy_loss(
            hidden.view(*batch.token_ids.shape, -1),
            weight,
            batch.token_ids,
            batch.logprobs,
            batch.advantages,
            batch.loss_mask,
            ref_logprobs=batch.ref_logprobs,
            clip_range=CLIP_RANGE,
            kl_coef=KL_COEF,
            entropy_coef=batch.entropy_coef,
        )
        return (loss,)

    return run


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


def _sample_tokens(case: Case) -> Function:
    return lambda logits, _: fk.sample_tokens(
        logits, temperature=case.temperature, top_p=case.top_p, seed=0
    )


_LINEAR = {
    "cpu": Sizes(num_rows=512, vocab_size=32000, hidden_size=1024),
    "cuda": Sizes(num_rows=8192, vocab_size=128256, hidden_size=4096),
}
_LAYER = {
    "cpu": Sizes(num_rows=2048, hidden_size=2048),
    "cuda": Sizes(num_rows=8192, hidden_size=4096),
}
_TOKENS = Sizes(num_sequences=512, num_slots=1024)
_ON_TOKENS: dict[str, Any] = {
    "defaults": {"cpu": _TOKENS, "cuda": _TOKENS},
    "dtypes": {
        "cpu": "fp32",
        "cuda": "fp32",
    },  # trainers keep what is one number a token in float32
}

OPS: dict[str, Op] = {
    "token_logprobs": Op(
        problem=logprobs_problem,
        cost=rows_cost,
        ours=_token_logprobs,
        rivals={
            BASELINE: rivals.torch_rows,
            "torch-compile": rivals.torch_compile_rows,
            "trl": rivals.trl_rows,
            "trl-triton": rivals.trl_triton_rows,
        },
        defaults={
            "cpu": Sizes(num_rows=512, vocab_size=128256),
            "cuda": Sizes(num_rows=8192, vocab_size=128256),
        },
        options={"with_entropy": False, "inplace_grad": False},
    ),
    "linear_token_logprobs": Op(
        problem=logprobs_problem,
        cost=linear_cost,
        ours=_linear_token_logprobs,
        rivals={
            BASELINE: rivals.torch_linear,
            "torch-compile": rivals.torch_compile_linear,
            "torch-chunked": rivals.torch_chunked_linear,
            "trl": rivals.trl_linear,
            "liger": rivals.liger_linear,
            "cut-cross-entropy": rivals.cce_linear,
        },
        defaults=_LINEAR,
        options={"with_entropy": False},
    ),
    "linear_policy_loss": Op(
        problem=policy_problem,
        cost=linear_cost,
        ours=_linear_policy_loss,
        rivals={
            BASELINE: with_loss(rivals.torch_linear),
            "torch-compile": rivals.torch_compile_loss,
            "torch-chunked": with_loss(rivals.torch_chunked_linear),
            "trl": with_loss(rivals.trl_linear),
            "liger": rivals.liger_loss,
            "cut-cross-entropy": with_loss(rivals.cce_linear),
        },
        defaults=_LINEAR,
        options={"with_entropy": False},
        passes=("forward_backward",),
    ),
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
    "sample_tokens": Op(
        problem=sampling.sampling_problem,
        cost=rows_cost,  # one read of the logits
        ours=_sample_tokens,
        rivals={
            BASELINE: sampling.torch_sampler,
            "transformers": sampling.transformers_sampler,
            "exp-sum": sampling.exp_sum,
        },
        defaults={
            "cpu": Sizes(num_rows=64, vocab_size=128256),
            "cuda": Sizes(num_rows=256, vocab_size=128256),
        },
        passes=("forward",),
        has_gradient=False,
        options={"temperature": 0.8, "top_p": 0.95},
    ),
    "rms_norm": Op(
        problem=norms.norm_problem,
        cost=norms.norm_cost,
        ours=norms.ours,
        rivals={
            BASELINE: norms.torch_norm,
            "torch-compile": token_rivals.compiled(norms.torch_norm),
            "transformers": norms.transformers_rms,
            "liger": norms.liger_norm,
        },
        defaults=_LAYER,
        options={"with_residual": False},
    ),
    "layer_norm": Op(
        problem=norms.norm_problem,
        cost=norms.norm_cost,
        ours=norms.ours,
        rivals={
            BASELINE: norms.torch_norm,
            "torch-compile": token_rivals.compiled(norms.torch_norm),
            "liger": norms.liger_norm,
        },
        defaults=_LAYER,
        options={"with_residual": False},
    ),
    "rotary": Op(
        problem=rotary.rotary_problem,
        cost=rotary.rotary_cost,
        ours=rotary.rotary_ours,
        rivals={
            BASELINE: rotary.rotary_eager,
            "torch-compile": token_rivals.compiled(rotary.rotary_eager),
            "transformers": rotary.rotary_transformers,
        },
        defaults={
            "cpu": Sizes(num_rows=512, hidden_size=1024),
            "cuda": Sizes(num_rows=8192, hidden_size=4096),
        },
    ),
    "rotary_kv_write": Op(
        problem=rotary.rotary_kv_write_problem,
        cost=rotary.rotary_cost,
        ours=rotary.rotary_kv_write_ours,
        rivals={
            BASELINE: rotary.rotary_kv_write_eager,
            "torch-compile": token_rivals.compiled(rotary.rotary_kv_write_eager),
        },
        defaults={
            "cpu": Sizes(num_rows=64, hidden_size=1024),
            "cuda": Sizes(num_rows=256, hidden_size=4096),
        },
        passes=("forward",),
        has_gradient=False,
    ),
    "decode_attention": Op(
        problem=attention.attention_problem,
        cost=attention.attention_cost,
        ours=attention.ours,
        rivals={
            BASELINE: attention.sdpa,
            "torch-eager": attention.eager,
            "torch-compile": token_rivals.compiled(attention.sdpa),
        },
        defaults={
            "cpu": Sizes(num_rows=32, num_heads=8, num_kv_heads=2, head_dim=64, num_tokens=512),
            "cuda": Sizes(
                num_rows=256, num_heads=32, num_kv_heads=8, head_dim=128, num_tokens=2048
            ),
        },
        passes=("forward",),
        has_gradient=False,
    ),
    "glu": Op(
        problem=glu.glu_problem,
        cost=glu.glu_cost,
        ours=glu.glu_ours,
        rivals={
            BASELINE: glu.glu_eager,
            "torch-compile": token_rivals.compiled(glu.glu_eager),
            "transformers": glu.glu_transformers,
            "liger": glu.glu_liger,
        },
        defaults={
            "cpu": Sizes(num_rows=512, hidden_size=1536),
            "cuda": Sizes(num_rows=8192, hidden_size=14336),
        },
    ),
}


def find_op(name: str) -> Op:
    if name not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
    return OPS[name]


def _ours(op: str, implementation: str) -> Provider:
    def make(case: Case) -> Function:
        if implementation == "triton" and case.device != "cuda":
            raise Unavailable("it needs a CUDA device; Triton's interpreter is not timed")
        with fk.use_backend(implementation):
            try:
                sample = torch.empty(0, dtype=case.torch_dtype, device=case.device)
                backend.select(op, tables()[op], sample)
            except RuntimeError as error:
                raise Unavailable(str(error)) from None
        return OPS[op].ours(case)

    return Provider(f"fuserl-{implementation}", make, implementation)


def providers(op: str, names: str = "all") -> list[Provider]:
    """Those named, separated by commas; plain torch is always among them, for the ratios.

    Raises ValueError for a name that is not in the table.
    """
    known = [_ours(op, implementation) for implementation in tables()[op]]
    known += [Provider(name, make) for name, make in find_op(op).rivals.items()]
    wanted = [name.strip() for name in names.split(",")]
    unknown = sorted(set(wanted) - {"all", *(provider.name for provider in known)})
    if unknown:
        raise ValueError(
            f"providers must be all or some of {', '.join(p.name for p in known)}, "
            f"got {', '.join(unknown)}"
        )
    return [p for p in known if "all" in wanted or p.name in (*wanted, BASELINE)]

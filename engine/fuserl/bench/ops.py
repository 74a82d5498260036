"""The table of benchmarked ops: a new op joins by one entry.

A provider is named `fuserl-<implementation>` or after its library. The first rival of each op is
plain torch, to which the others' times are compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import fuserl_kernels as fk
from fuserl.bench import rivals
from fuserl.bench.case import PASSES, Case, Cost, linear_cost, rows_cost
from fuserl.bench.problem import (
    CLIP_RANGE,
    KL_COEF,
    PolicyBatch,
    Problem,
    Tensors,
    logprobs_problem,
    policy_problem,
)
from fuserl.bench.rivals import Function, Make, Unavailable, with_loss
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


@dataclass(frozen=True, slots=True)
class Sizes:
    num_rows: int
    vocab_size: int
    hidden_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """defaults: sizes by device. passes: what "all" times."""

    problem: Callable[[Case], Problem]
    cost: Callable[[Case], Cost]
    ours: Make
    rivals: Mapping[str, Make]
    defaults: Mapping[str, Sizes]
    passes: tuple[str, ...] = PASSES


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
        defaults={"cpu": Sizes(512, 128256), "cuda": Sizes(8192, 128256)},
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
        defaults={"cpu": Sizes(512, 32000, 1024), "cuda": Sizes(8192, 128256, 4096)},
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
        defaults={"cpu": Sizes(512, 32000, 1024), "cuda": Sizes(8192, 128256, 4096)},
        passes=("forward_backward",),
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

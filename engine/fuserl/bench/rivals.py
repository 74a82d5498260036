"""The other libraries, each imported only when it is asked for.

A `make` function takes a case and returns the function to time; it raises Unavailable with the
reason where the library is not installed or has no such feature. Arguments and results are those of
the problem (problem.py). Nothing here changes a library's defaults except where the case needs it.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fuserl.bench.case import Case
from fuserl.bench.problem import (
    CLIP_RANGE,
    KL_COEF,
    PolicyBatch,
    eager_linear_logprobs,
    eager_logprobs,
)
from fuserl.bench.truth import Tensors

Function = Callable[..., Tensors]
Make = Callable[[Case], Function]


class Unavailable(Exception):
    """Why a provider cannot run a case here."""


def load(module: str, name: str) -> Any:
    """An attribute of a library that may be absent. Raises Unavailable."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise Unavailable(f"{module} cannot be imported ({first_line})") from None
    except AttributeError:
        raise Unavailable(f"the installed {module} has no {name}") from None


def _refuse_entropy(case: Case) -> None:
    if case.with_entropy:
        raise Unavailable("it gives no entropy")


# --- rows of logits


def torch_rows(case: Case) -> Function:
    return lambda logits, token_ids: eager_logprobs(logits, token_ids, case.with_entropy)


def torch_compile_rows(case: Case) -> Function:
    def run(logits: torch.Tensor, token_ids: torch.Tensor) -> Tensors:
        return eager_logprobs(logits.float(), token_ids, case.with_entropy)

    return torch.compile(run, dynamic=False)


def trl_rows(case: Case) -> Function:
    logprobs = load("trl.trainer.utils", "selective_log_softmax")
    if not case.with_entropy:
        return lambda logits, token_ids: (logprobs(logits, token_ids),)
    entropy = load("trl.trainer.utils", "entropy_from_logits")
    return lambda logits, token_ids: (logprobs(logits, token_ids), entropy(logits))


def trl_triton_rows(case: Case) -> Function:
    if case.device != "cuda":
        raise Unavailable("it is a Triton kernel and needs a CUDA device")
    both = load("trl.kernels", "selective_log_softmax_and_entropy")
    return lambda logits, token_ids: both(logits, token_ids)[: 1 + case.with_entropy]


# --- hidden states and the weight of the output layer


def torch_linear(case: Case) -> Function:
    return lambda hidden, weight, token_ids: eager_linear_logprobs(
        hidden, weight, token_ids, case.with_entropy
    )


def torch_compile_linear(case: Case) -> Function:
    def run(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor) -> Tensors:
        return eager_logprobs(F.linear(hidden, weight).float(), token_ids, case.with_entropy)

    return torch.compile(run, dynamic=False)


def torch_chunked_linear(case: Case) -> Function:
    _refuse_entropy(case)
    cross_entropy = load("torch.nn.functional", "linear_cross_entropy")
    options = load("torch.nn", "LinearCrossEntropyOptions")()
    return lambda hidden, weight, token_ids: (
        -cross_entropy(hidden, weight, token_ids, reduction="none", options=options),
    )


def trl_linear(case: Case) -> Function:
    function = load("trl.kernels", "ChunkedLogProbFunction")
    chunk_size = load("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
    extra = ("entropy",) if case.with_entropy else ()

    def run(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor) -> Tensors:
        outputs = function.apply(hidden, weight, None, token_ids, 1.0, chunk_size, None, 1.0, extra)
        return outputs[: 1 + case.with_entropy]

    return run


def liger_linear(case: Case) -> Function:
    _refuse_entropy(case)
    module = "liger_kernel.chunked_loss.fused_linear_ppo"
    function = load(module, "_ChunkedSelectiveLogProbFunction")
    chunk_size = load(module, "_SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE")
    return lambda hidden, weight, token_ids: (
        function.apply(hidden, weight, token_ids, None, 1.0, chunk_size),
    )


def cce_linear(case: Case) -> Function:
    """On CUDA its own kernel, which by default drops gradients below a threshold."""
    _refuse_entropy(case)
    cross_entropy = load("cut_cross_entropy", "linear_cross_entropy")
    impl = "cce" if case.device == "cuda" else "torch_compile"
    return lambda hidden, weight, token_ids: (
        -cross_entropy(hidden, weight, token_ids, reduction="none", impl=impl),
    )


# --- the policy loss on top


def with_loss(make: Make) -> Make:
    """A provider of log-probabilities, with the plain policy loss behind it."""

    def made(case: Case) -> Function:
        logprobs = make(case)

        def run(hidden: torch.Tensor, weight: torch.Tensor, batch: PolicyBatch) -> Tensors:
            outputs = logprobs(hidden, weight, batch.token_ids.view(-1))
            return (batch.loss(outputs[0], outputs[1] if case.with_entropy else None),)

        return run

    return made


def torch_compile_loss(case: Case) -> Function:
    logprobs = with_loss(
        lambda case: (
            lambda hidden, weight, token_ids: eager_logprobs(
                F.linear(hidden, weight).float(), token_ids, case.with_entropy
            )
        )
    )
    return torch.compile(logprobs(case), dynamic=False)


def liger_loss(case: Case) -> Function:
    if case.with_entropy:
        raise Unavailable("it has no entropy bonus")
    kind = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")

    def run(hidden: torch.Tensor, weight: torch.Tensor, batch: PolicyBatch) -> Tensors:
        num_sequences, length = batch.token_ids.shape
        # Its default of one sequence a chunk starves a CPU; 2048 tokens is its own row chunk.
        loss = kind(
            beta=KL_COEF,
            epsilon_low=CLIP_RANGE,
            epsilon_high=CLIP_RANGE,
            loss_type="dapo",
            chunk_size=max(1, 2048 // length),
        )
        return (
            loss(
                hidden.view(num_sequences, length, -1),
                weight,
                batch.token_ids,
                batch.loss_mask.float(),
                batch.advantages,
                ref_per_token_logps=batch.ref_logprobs,
                old_per_token_logps=batch.logprobs,
            )[0],
        )

    return run

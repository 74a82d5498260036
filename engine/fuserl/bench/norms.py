"""The norms: their problems, what they must cost, and the other implementations.

A provider takes x [N, D], weight [D], bias [D] (layer_norm only) and, where the case has one, a
residual [N, D]; it returns y, and with a residual the sum too. The residual asks for no gradient of
its own: it is that of x.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

import fuserl_kernels as fk
from fuserl.bench.case import Case, Cost
from fuserl.bench.problem import Problem
from fuserl.bench.rivals import Function, Make, Unavailable, load
from fuserl.bench.truth import Tensors, Truth

EPS = 1e-6


def _is_rms(case: Case) -> bool:
    return case.op == "rms_norm"


def norm_problem(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    shape = (case.num_rows, case.hidden_size)
    x = (normal(*shape) + 0.2).to(case.torch_dtype)
    vectors = [(1 + 0.1 * normal(case.hidden_size)).to(case.torch_dtype)]
    if not _is_rms(case):
        vectors.append(normal(case.hidden_size).to(case.torch_dtype))
    residuals = [normal(*shape).to(case.torch_dtype)] if case.with_residual else []
    rows = (x + residuals[0] if residuals else x).double()
    mean = 0.0 if _is_rms(case) else rows.mean(-1, keepdim=True)
    rstd = ((rows - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    n = (rows - mean) * rstd
    y = n * vectors[0].double()
    if not _is_rms(case):
        y = y + vectors[1].double()
    outputs = (y, rows) if residuals else (y,)
    cotangents = tuple(normal(*shape) for _ in outputs)
    truth = Truth(outputs)
    if case.backward:
        g = cotangents[0].to(case.torch_dtype).double()  # as a provider gets it
        v = g * vectors[0].double()
        slope = v - n * (v * n).mean(-1, keepdim=True)
        if not _is_rms(case):
            slope = slope - v.mean(-1, keepdim=True)
        grad_x = slope * rstd
        if residuals:
            grad_x = grad_x + cotangents[1].to(case.torch_dtype).double()
        exact = [grad_x, (g * n).sum(0), *([] if _is_rms(case) else [g.sum(0)])]
        truth = Truth(outputs, tuple((_all(t), t) for t in exact))
        for tensor in (x, *vectors):
            tensor.requires_grad_()
    return Problem(case, (x, *vectors, *residuals), 1 + len(vectors), cotangents, truth)


def _all(tensor: torch.Tensor) -> torch.Tensor:
    """Indices of all of its rows."""
    return torch.arange(tensor.shape[0], device=tensor.device)


def norm_cost(case: Case) -> Cost:
    """x read, y written; backward: rows and gradient read, one written. With a residual one more
    is read and one more written, and backward reads the sum's gradient too."""
    passes = 4 if case.with_residual else 2
    if case.backward:
        passes += 4 if case.with_residual else 3
    return Cost(passes * case.num_rows * case.hidden_size * case.torch_dtype.itemsize, 0)


def ours(case: Case) -> Function:
    function: Callable[..., Any] = fk.rms_norm if _is_rms(case) else fk.layer_norm

    def run(x: torch.Tensor, *rest: torch.Tensor) -> Tensors:
        if not case.with_residual:
            return (function(x, *rest, eps=EPS),)
        *vectors, residual = rest
        return function(x, *vectors, residual=residual, eps=EPS)

    return run


def _after_adding(norm: Callable[..., torch.Tensor]) -> Make:
    """A provider from norm(case, x, *vectors), which knows no residual."""

    def make(case: Case) -> Function:
        def run(x: torch.Tensor, *rest: torch.Tensor) -> Tensors:
            if not case.with_residual:
                return (norm(case, x, *rest),)
            *vectors, residual = rest
            summed = x + residual
            return norm(case, summed, *vectors), summed

        return run

    return make


def _torch(
    case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    if _is_rms(case):
        return F.rms_norm(x, x.shape[-1:], weight, EPS)
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


torch_norm = _after_adding(_torch)


def transformers_rms(case: Case) -> Function:
    """The forward of its module, with the weight of the problem."""
    module = load("transformers.models.llama.modeling_llama", "LlamaRMSNorm")

    def norm(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return module.forward(SimpleNamespace(weight=weight, variance_epsilon=EPS), x)

    return _after_adding(norm)(case)


def liger_norm(case: Case) -> Function:
    """By defaults its RMSNorm rounds as Llama's module does; not in place, which would end the
    problem's inputs."""
    if case.device != "cuda":
        raise Unavailable("it is a Triton kernel and needs a CUDA device")
    if not _is_rms(case):
        function = load("liger_kernel.ops.layer_norm", "LigerLayerNormFunction")
        return _after_adding(lambda case, x, *vectors: function.apply(x, *vectors, EPS))(case)
    if case.with_residual:
        fused = load("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
        return lambda x, weight, residual: fused.apply(
            x, residual, weight, EPS, 0.0, "llama", False
        )
    function = load("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    return lambda x, weight: (function.apply(x, weight, EPS, 0.0, "llama", False),)

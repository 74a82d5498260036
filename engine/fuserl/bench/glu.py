"""The gated activation silu(gate) * up of an MLP, with I = hidden_size.

inputs: gate_up [N, 2 I], the gate half first; output: [N, I].
"""

import torch
import torch.nn.functional as F

import fuserl_kernels as fk
from fuserl.bench.case import Case, Cost
from fuserl.bench.problem import Problem
from fuserl.bench.rivals import Function, Unavailable, load
from fuserl.bench.truth import Tensors, Truth


def glu_problem(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator(case.device).manual_seed(seed)
    num_rows, size = case.num_rows, case.hidden_size

    def normal(columns: int) -> torch.Tensor:
        return torch.randn(num_rows, columns, generator=generator, device=case.device)

    gate_up = normal(2 * size).to(case.torch_dtype)
    cotangent = normal(size)
    gate, up = gate_up.double().chunk(2, -1)
    share = gate.sigmoid()
    gradients: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    if case.backward:
        gate_up.requires_grad_()
        grad = cotangent.to(case.torch_dtype).double()
        slope = torch.cat((grad * up * share * (1 + gate * (1 - share)), grad * gate * share), -1)
        gradients = ((torch.arange(num_rows, device=case.device), slope),)
    return Problem(case, (gate_up,), 1, (cotangent,), Truth((gate * share * up,), gradients))


def glu_cost(case: Case) -> Cost:
    """Both halves and the output; backward reads both and its gradient and writes two."""
    passes = 3 + 5 * case.backward
    return Cost(passes * case.num_rows * case.hidden_size * case.torch_dtype.itemsize, 0)


def glu_ours(case: Case) -> Function:
    return lambda gate_up: (fk.glu(gate_up),)


def glu_eager(case: Case) -> Function:
    def run(gate_up: torch.Tensor) -> Tensors:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) * up,)

    return run


def glu_transformers(case: Case) -> Function:
    """What LlamaMLP does between its projections."""
    activation = load("transformers.activations", "ACT2FN")["silu"]

    def run(gate_up: torch.Tensor) -> Tensors:
        gate, up = gate_up.chunk(2, -1)
        return (activation(gate) * up,)

    return run


def glu_liger(case: Case) -> Function:
    function = load("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    if case.device != "cuda":
        raise Unavailable("its Triton kernel needs a CUDA device")
    return lambda gate_up: (function.apply(*gate_up.chunk(2, -1)),)

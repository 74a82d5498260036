"""A provider's call on a problem, and how far its answer is from the truth."""

import torch

import fuserl_kernels as fk
from fuserl.bench.problem import Problem
from fuserl.bench.rivals import Function
from fuserl.bench.truth import Error, Tensors

# Rivals round where they like (native bf16 gives entropies wrong by 0.17): wrong is what
# rounding does not explain. Ours may err as much as eager torch in the same dtype, and this more.
RIVAL_BOUND = {"fp32": Error(1e-3, 1e-3), "bf16": Error(0.3, 0.05), "fp16": Error(0.02, 0.01)}
OURS_MORE = {"fp32": Error(2e-5, 2e-5), "bf16": Error(2e-3, 5e-3), "fp16": Error(5e-4, 1e-3)}


def bound_for(dtype: str, is_ours: bool, baseline: Error | None) -> Error:
    """baseline: the error of eager torch, None where it could not run or was wrong itself."""
    if not is_ours or baseline is None:
        return RIVAL_BOUND[dtype]
    more = OURS_MORE[dtype]
    return Error(baseline.value + more.value, baseline.gradient + more.gradient)


class Call:
    """One provider on one problem. prepare() makes what a call uses up and is never timed."""

    def __init__(self, problem: Problem, function: Function, backend: str | None) -> None:
        self._problem, self._function = problem, function
        self._backend = backend or "auto"
        self._inputs = problem.inputs

    def prepare(self) -> None:
        if self._problem.case.inplace_grad:
            first, *rest = self._problem.inputs
            self._inputs = (first.clone(), *rest)  # the output of an op, as inplace_grad needs

    def run(self) -> tuple[Tensors, Tensors]:
        """The outputs, and the gradients of the problem's cotangents."""
        problem = self._problem
        with fk.use_backend(self._backend):
            if not problem.case.backward:
                with torch.no_grad():
                    return self._function(*self._inputs), ()
            outputs = self._function(*self._inputs)
            sources = outputs[: len(problem.cotangents)]
            cotangents = [c.to(o.dtype) for c, o in zip(problem.cotangents, sources, strict=True)]
            wanted = self._inputs[: problem.num_grads]
            return outputs, torch.autograd.grad(sources, wanted, cotangents)


def measure_error(problem: Problem, outputs: Tensors, gradients: Tensors) -> Error:
    """NaN anywhere in an answer is an infinite error, at unchecked rows of a gradient too."""
    truth = problem.truth
    return Error(truth.value_error(outputs), truth.gradient_error(gradients))

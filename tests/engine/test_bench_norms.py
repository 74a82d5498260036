"""The benchmark's problems of the norms: truths, costs, and every provider that runs here."""

import dataclasses

import pytest
import torch

from fuserl.bench import norms
from fuserl.bench.case import Case, Cost
from fuserl.bench.checking import Call
from fuserl.bench.op import BASELINE
from fuserl.bench.ops import OPS, providers
from fuserl.bench.run import cases_of, check
from fuserl.config import BenchConfig


def tiny(op: str, with_residual: bool, dtype: str = "fp32") -> Case:
    return Case(
        op=op,
        pass_name="forward_backward",
        device="cpu",
        dtype=dtype,
        num_rows=5,
        hidden_size=24,
        with_residual=with_residual,
    )


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_the_truth_is_torchs_in_float64(op: str, with_residual: bool) -> None:
    problem = OPS[op].problem(tiny(op, with_residual))
    wide = [x.detach().double() for x in problem.inputs]
    if with_residual:  # the sum is that of rounded numbers
        wide[0] = (problem.inputs[0] + problem.inputs[-1]).detach().double()
        wide[-1] = torch.zeros_like(wide[-1])
    for x in wide[: problem.num_grads]:
        x.requires_grad_()
    exact = dataclasses.replace(problem, inputs=tuple(wide))
    outputs, gradients = Call(exact, OPS[op].rivals[BASELINE](problem.case), None).run()
    assert problem.truth.value_error(outputs) < 1e-12
    assert problem.truth.gradient_error(gradients) < 1e-12


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_every_provider_is_right(op: str, dtype: str, with_residual: bool) -> None:
    problem = OPS[op].problem(tiny(op, with_residual, dtype))
    baseline, timed = None, []
    for provider in sorted(providers(op), key=lambda p: p.name != BASELINE):
        if provider.name == "torch-compile":  # the same function, which takes long to compile
            continue
        result, _ = check(problem, provider, baseline)
        if provider.name == BASELINE:
            baseline = result.error
        if result.status != "unavailable":
            assert result.status == "timed", (provider.name, result.reason)
            timed.append(provider.name)
    assert {BASELINE, "fuserl-reference"} <= set(timed)


def test_what_must_move_is_counted_by_hand() -> None:
    tensor = 5 * 24 * 4
    for with_residual, forward, backward in ((False, 2, 3), (True, 4, 4)):
        both = tiny("rms_norm", with_residual)
        alone = dataclasses.replace(both, pass_name="forward")
        assert norms.norm_cost(alone) == Cost(forward * tensor, 0)
        assert norms.norm_cost(both) == Cost((forward + backward) * tensor, 0)


def test_the_residual_is_an_option_of_the_norms_alone() -> None:
    cases = cases_of(BenchConfig(op="layer_norm", device="cpu", with_residual=True))
    assert all("with residual" in case.title for case in cases)
    with pytest.raises(ValueError, match="with_residual makes no sense with gae"):
        cases_of(BenchConfig(op="gae", device="cpu", with_residual=True))

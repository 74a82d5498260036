"""The norms on the CPU: every instruction set within the error rule, and no bit from threads."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import assert_error_rule

import fuserl_kernels as fk
from fuserl_kernels import native

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)


def run(kind, x, residual, weight, bias, grad_y):
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    if kind == "rms":
        y, summed = fk.rms_norm(x, weight, residual=residual, weight_offset=1.0)
        grads = torch.autograd.grad((y, summed), (x, weight), (grad_y, grad_y))
    else:
        y, summed = fk.layer_norm(x, weight, bias, residual=residual)
        grads = torch.autograd.grad((y, summed), (x, weight, bias), (grad_y, grad_y))
    return y.detach(), summed, *grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_instruction_sets(instructions, kind, dtype):
    for width in (1, 5, 17, 64, 100, 1031):
        x, residual, grad_y = torch.randn(3, 70, width).to(dtype).unbind()
        weight, bias = torch.randn(2, width).to(dtype).unbind()
        with fk.use_backend("native"):
            y, summed, *grads = run(kind, x, residual, weight, bias, grad_y)
            alone = run(kind, x + residual, torch.zeros_like(x), weight, bias, grad_y)
        assert torch.equal(summed, x + residual)
        for fused, added in zip((y, *grads), (alone[0], *alone[2:]), strict=True):
            assert torch.equal(fused, added)
        truth, peer = (
            F.rms_norm(s, (width,), 1 + w, 1e-6)
            if kind == "rms"
            else F.layer_norm(s, (width,), w, b, 1e-5)
            for s, w, b in (
                (summed.double(), weight.double(), bias.double()),
                (summed, weight, bias),
            )
        )
        assert_error_rule(y, peer, truth, 3e-6)
        # The definition in float64 judges the gradients.
        wide = [t.double() for t in (summed, torch.zeros_like(x), weight, bias, grad_y)]
        with fk.use_backend("reference"):
            exact = run(kind, *wide)[2:]
        for got, want in zip(grads, exact, strict=True):
            ulp = torch.finfo(dtype).eps * want.abs().max().item()
            assert (got - want).abs().max() <= ulp + 2e-5 * (dtype == torch.float32)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_threads_change_no_bit(instructions, kind):
    x, residual, grad_y = torch.randn(3, 513, 300).bfloat16().unbind()
    weight, bias = torch.randn(2, 300).unbind()
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            with fk.use_backend("native"):
                results.append(run(kind, x, residual, weight, bias, grad_y))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)

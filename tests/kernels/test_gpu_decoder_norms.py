"""The norms on a real GPU: right at real sizes, the same bits in any batch."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import assert_error_rule

import fuserl_kernels as fk

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [
    pytest.param("rms", marks=pytest.mark.covers("rms_norm")),
    pytest.param("layer", marks=pytest.mark.covers("layer_norm")),
]
WIDTHS = [64, 128, 576, 4096, 4097, 8192, 16384, 20001]


def inputs(dtype, num_rows, width):
    """x, residual, two cotangents [N, D]; weight and bias [D]."""
    rows = torch.randn(4, num_rows, width, device=DEVICE).to(dtype).unbind()
    weight, bias = (1 + 0.2 * torch.randn(2, width, device=DEVICE)).to(dtype).unbind()
    return *rows, weight.requires_grad_(), bias.requires_grad_()


def ours(kind, x, weight, bias, residual=None):
    if kind == "rms":
        return fk.rms_norm(x, weight, residual=residual)
    return fk.layer_norm(x, weight, bias, residual=residual)


def eager(kind, x, weight, bias):
    if kind == "rms":
        return F.rms_norm(x, weight.shape, weight, 1e-6)
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_error_rule(kind, dtype, width):
    x, residual, grad_y, grad_sum, weight, bias = inputs(dtype, 2000, width)
    x.requires_grad_()
    y, summed = ours(kind, x, weight, bias, residual)
    leaves = (x, weight, bias) if kind == "layer" else (x, weight)
    mine = torch.autograd.grad((y, summed), leaves, (grad_y, grad_sum))
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, ours(kind, summed, weight, bias))

    def judged(convert):
        s, w, b = (convert(t.detach()).requires_grad_() for t in (summed, weight, bias))
        out = eager(kind, s, w, b)
        wanted = (s, w, b) if kind == "layer" else (s, w)
        cotangents = convert(grad_y), convert(grad_sum)
        return out.detach(), torch.autograd.grad((out, s * 1), wanted, cotangents)

    peer, peers = judged(torch.clone)
    exact, truths = judged(torch.Tensor.double)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 1e-4, torch.float16: 2e-5}[dtype]
    assert_error_rule(y.detach(), peer, exact, tolerance)
    for got, theirs, truth in zip(mine, peers, truths, strict=True):
        ulp = truth.abs().max().item() * torch.finfo(dtype).eps
        assert_error_rule(got, theirs, truth, tolerance + ulp)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_and_of_a_run(kind, width):
    """A row alone is that row of a batch; two runs give equal gradients of the weight."""
    x, residual, grad_y, _, weight, bias = inputs(torch.bfloat16, 4099, width)
    x.requires_grad_()
    y, summed = ours(kind, x, weight, bias, residual)
    first = torch.autograd.grad(y, (x, weight), grad_y, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight), grad_y)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    for rows in (slice(17, 18), slice(100, 133)):
        leaf = x[rows].detach().requires_grad_()
        some, added = ours(kind, leaf, weight, bias, residual[rows])
        assert torch.equal(some, y[rows])
        assert torch.equal(added, summed[rows])
        assert torch.equal(torch.autograd.grad(some, leaf, grad_y[rows])[0], first[0][rows])


@pytest.mark.covers("rms_norm")
def test_a_slice_of_heads_is_read_where_it_lies():
    packed = torch.randn(512, 48 * 128, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.randn(128, device=DEVICE, requires_grad=True)
    results = []
    for copied in (False, True):
        heads = packed.view(512, 48, 128)[:, 32:40]
        y = fk.rms_norm(heads.contiguous() if copied else heads, weight)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (packed, weight))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)

"""fixed_linear and its gradients against float64 and torch, and the bits that it promises. Sizes
and layouts of the product alone are test_packed_weight.py."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import assert_error_rule, opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import native
from fuserl_kernels.fixed_linear import FORWARD

BACKENDS = runnable(FORWARD)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, inputs, outputs
SIZES = [(1, 1, 1), (2, 35, 17), (9, 512, 47), (33, 513, 50), (7, 1100, 15), (1, 64, 1)]
needs_native = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)


def operands(dtype, num_rows, num_inputs, num_outputs):
    """x, weight, bias, and a gradient of the result"""
    shapes = [(num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,)]
    return [torch.randn(shape).to(dtype) for shape in (*shapes, (num_rows, num_outputs))]


def with_gradients(function, x, weight, bias, grad):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def assert_right(x, weight, bias, grad):
    ours = with_gradients(fk.fixed_linear, x, weight, bias, grad)
    peers = with_gradients(F.linear, x, weight, bias, grad)
    wide = [None if t is None else t.double() for t in (x, weight, bias, grad)]
    truths = with_gradients(F.linear, *wide)
    sizes = with_gradients(F.linear, *(None if t is None else t.abs() for t in wide))
    for mine, peer, truth, size in zip(ours, peers, truths, sizes, strict=True):
        assert mine.dtype == x.dtype
        assert mine.shape == truth.shape
        assert_error_rule(mine, peer, truth, 2.0**-21 * size.max().item())


def test_the_definition_and_its_gradient():
    x, weight, bias, _ = operands(torch.float64, 4, 7, 5)
    torch.testing.assert_close(fk.fixed_linear(x, weight, bias), F.linear(x, weight, bias))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(fk.fixed_linear, leaves)
    assert torch.autograd.gradcheck(fk.fixed_linear, leaves[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_errs_no_more_than_torch(backend, dtype, with_bias):
    for sizes in SIZES:
        x, weight, bias, grad = operands(dtype, *sizes)
        with fk.use_backend(backend):
            assert_right(x, weight, bias if with_bias else None, grad)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_instruction_set(instructions, dtype):
    for sizes in SIZES:
        with fk.use_backend("native"):
            assert_right(*operands(dtype, *sizes))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_with_any_threads(instructions, dtype):
    x, weight, bias, _ = operands(dtype, 300, 530, 67)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            results.append(fk.fixed_linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    for rows in (slice(0, 1), slice(130, 139), slice(299, 300)):
        assert torch.equal(fk.fixed_linear(x[rows], weight, bias), results[0][rows])


@needs_native
def test_gradients_of_a_row_have_the_same_bits_alone(instructions):
    """In float32, whose gradients take the same products."""
    x, weight, bias, grad = operands(torch.float32, 140, 65, 520)
    whole = with_gradients(fk.fixed_linear, x, weight, bias, grad)
    for rows in (slice(0, 1), slice(61, 70)):
        part = with_gradients(fk.fixed_linear, x[rows], weight, bias, grad[rows])
        assert torch.equal(part[1], whole[1][rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_broken_row_stays_alone(backend, poison):
    x, weight, bias, grad = operands(torch.float32, 20, 35, 47)
    others = torch.arange(20) != 11
    with fk.use_backend(backend):
        want = with_gradients(fk.fixed_linear, x, weight, bias, grad)
        x[11] = grad[11] = poison
        got = with_gradients(fk.fixed_linear, x, weight, bias, grad)
    for mine, other in zip(got[:2], want[:2], strict=True):
        assert torch.equal(mine[others], other[others])
        assert not mine[11].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_the_empty_batch(backend, dtype):
    x, weight, bias, grad = operands(dtype, 9, 33, 20)
    transposed = [t.t().contiguous().t() for t in (x, weight)]
    apart = torch.full((18, 40), torch.nan, dtype=dtype)[::2, 5:38].copy_(x)
    with fk.use_backend(backend):
        want = with_gradients(fk.fixed_linear, x, weight, bias, grad)
        near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 32 * torch.finfo(dtype).eps}
        cases = [(transposed[0], weight, grad), (x, transposed[1], grad), (apart, weight, grad)]
        for rows, matrix, given in [*cases, (x, weight, grad.t().contiguous().t())]:
            got = with_gradients(fk.fixed_linear, rows, matrix, bias, given)
            for mine, other in zip(got, want, strict=True):
                torch.testing.assert_close(mine, other, **near)
            assert backend == "reference" or torch.equal(got[0], want[0])
        scattered = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
        got = fk.fixed_linear(x, weight, scattered)
        torch.testing.assert_close(got, want[0], rtol=0, atol=0)
        even = torch.ones((), dtype=dtype).expand(9, 20)  # what a sum's gradient is
        spread = with_gradients(fk.fixed_linear, x, weight, bias, even)
        same = with_gradients(fk.fixed_linear, x, weight, bias, even.contiguous())
        for mine, other in zip(spread, same, strict=True):
            torch.testing.assert_close(mine, other, **near)
        empty = with_gradients(fk.fixed_linear, x[:0], weight, bias, grad[:0])
        assert [t.shape for t in empty] == [(0, 20), (0, 33), (20, 33), (20,)]
        assert not any(t.any() for t in empty[2:])
        assert fk.fixed_linear(x, weight[:0]).shape == (9, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_gradients_that_are_wanted(backend, dtype):
    given = operands(dtype, 5, 12, 7)
    with fk.use_backend(backend):
        whole = with_gradients(fk.fixed_linear, *given)[1:]
        for number in range(3):
            leaves = [t.detach() for t in given[:3]]
            leaves[number].requires_grad_()
            fk.fixed_linear(*leaves).backward(given[3])
            assert [leaf.grad is not None for leaf in leaves].index(True) == number
            assert torch.equal(leaves[number].grad, whole[number])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, weight, bias, grad = operands(torch.float32, 3, 10, 6)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with fk.use_backend(backend):
        opcheck("fixed_linear", *leaves)
        opcheck("fixed_linear", leaves[0], weight.detach(), None)
        for wants in ((True, True), (True, False), (False, True)):
            opcheck("fixed_linear_bwd", x.detach(), weight.detach(), grad, *wants)


def test_compiles_whole():
    def function(x, weight, bias):
        return fk.fixed_linear(x * 2, weight, bias).square().sum()

    leaves = [t.requires_grad_() for t in operands(torch.float32, 6, 10, 4)[:3]]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(function(*leaves), leaves))


def test_no_second_derivative():
    leaves = [t.requires_grad_() for t in operands(torch.float32, 3, 4, 5)[:2]]
    (first,) = torch.autograd.grad(
        fk.fixed_linear(*leaves).square().sum(), leaves[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once more"):
        first.sum().backward()


X, WEIGHT = torch.randn(3, 4), torch.randn(5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.long(), WEIGHT), "x must"),
        ((X[0], WEIGHT), r"x must have shape \[N, K\]"),
        ((X[None], WEIGHT), r"x must have shape \[N, K\]"),
        ((X, WEIGHT[0]), r"weight must have shape \[M, 4\]"),
        ((X, WEIGHT[:, :3]), r"weight must have shape \[M, 4\], not \[5, 3\]"),
        ((X, WEIGHT.double()), "weight must be torch.float32 like x"),
        ((X, WEIGHT, torch.randn(4)), "bias must"),
        ((X, WEIGHT, torch.randn(5, 1)), "bias must"),
        ((X, WEIGHT, torch.randn(5).bfloat16()), "bias must be torch.float32 like x"),
        ((X, WEIGHT.to("meta")), "weight must be on"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fk.fixed_linear(*arguments)

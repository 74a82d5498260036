"""rms_norm and layer_norm: values, gradients, rounding points, bits, layouts, refused input."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import assert_error_rule, opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import triton_norms
from fuserl_kernels.norms import FORWARD
from fuserl_kernels.triton_runtime import Configuration

BACKENDS = runnable(FORWARD)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 33, 96, 128, 576, 4097]
NEAR = {torch.float32: 3e-6, torch.bfloat16: 1e-4, torch.float16: 2e-5}
EPS = 1e-5


@pytest.fixture
def small_blocks(monkeypatch):
    """Triton walks rows of more than 512 columns forward and 256 backward, 128 at a time, in four
    programs: what wide rows meet, at a size for the interpreter."""
    monkeypatch.setattr(triton_norms, "MAX_WHOLE", 512)
    monkeypatch.setattr(triton_norms, "MAX_WHOLE_BWD", 256)
    monkeypatch.setattr(triton_norms, "MAX_PARTS", 4)
    configuration = Configuration(4, 1, {"BLOCK_D": 128})
    monkeypatch.setattr(triton_norms, "WALK_CONFIGURATION", configuration)


def rows_of(*shape, dtype=torch.float64):
    """A leaf, with a mean that is not 0."""
    return (torch.randn(shape) + 0.3).to(dtype).requires_grad_()


def vector(width, dtype=torch.float64):
    return (1 + 0.2 * torch.randn(width)).to(dtype).requires_grad_()


def gradients(outputs, leaves, cotangents):
    return torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)


def wide(tensor):
    return tensor.detach().double().requires_grad_()


def ours(kind, x, weight, bias, residual=None, offset=0.0):
    if kind == "rms":
        return fk.rms_norm(x, weight, residual=residual, eps=EPS, weight_offset=offset)
    return fk.layer_norm(x, weight, bias, residual=residual, eps=EPS)


def eager(kind, x, weight, bias, offset=0.0):
    """torch's own, in the dtype of x."""
    if kind == "rms":
        return F.rms_norm(x, weight.shape, (offset + weight).to(x.dtype), EPS)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias, EPS)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer", "layer without bias"])
def test_gradients_of_the_definition(kind, fused):
    leaves = [rows_of(2, 3, 5), vector(5)]
    if kind == "layer":
        leaves.append(vector(5))
    if fused:
        leaves.append(rows_of(2, 3, 5))

    def run(x, weight, *rest):
        residual = rest[-1] if fused else None
        bias = rest[0] if kind == "layer" else None
        return ours(kind, x, weight, bias, residual, offset=1.0)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_error_rule(kind, backend, dtype, width):
    """Values and all gradients, with the residual, err no more than torch in the same dtype."""
    x, residual = rows_of(5, width, dtype=dtype), rows_of(5, width, dtype=dtype)
    weight, bias = vector(width, dtype), vector(width, dtype)
    offset = 1.0 if kind == "rms" else 0.0
    grad_y, grad_sum = torch.randn(2, 5, width).to(dtype)
    with fk.use_backend(backend):
        y, summed = ours(kind, x, weight, bias, residual, offset)
        mine = gradients((y, summed), (x, residual, weight, bias), (grad_y, grad_sum))
    assert y.dtype == summed.dtype == mine[0].dtype == dtype
    assert torch.equal(summed, x + residual)
    assert torch.equal(mine[0], mine[1])

    rounded = summed.detach().requires_grad_()
    peer = eager(kind, rounded, weight, bias, offset)
    peers = gradients((peer, rounded * 1), (rounded, weight, bias), (grad_y, grad_sum))
    exact_leaves = wide(rounded), wide(weight), wide(bias)
    exact = eager(kind, *exact_leaves, offset)
    cotangents = grad_y.double(), grad_sum.double()
    truths = gradients((exact, exact_leaves[0] * 1), exact_leaves, cotangents)
    assert_error_rule(y, peer, exact, NEAR[dtype])
    for got, theirs, truth in zip(mine[1:], peers, truths, strict=True):
        if truth is not None:
            # Rounding of a narrow peer may be lucky: an ulp of the largest entry is allowed.
            size = truth.abs().max().item() * torch.finfo(dtype).eps
            assert_error_rule(got, theirs, truth, NEAR[dtype] + size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transformers_own_modules(backend, dtype):
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = rows_of(4, 3, 96, dtype=dtype)
    for module, offset in ((llama.LlamaRMSNorm(96), 0.0), (gemma.GemmaRMSNorm(96), 1.0)):
        with torch.no_grad():
            module.weight += 0.2 * torch.randn(96)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        module.to(dtype)
        with fk.use_backend(backend):
            y = fk.rms_norm(x, module.weight, eps=eps, weight_offset=offset)
        truth = eager("rms", wide(x), wide(module.weight), None, offset)
        assert_error_rule(y, module(x), truth, NEAR[dtype])
        if offset and dtype != torch.float32:  # Gemma's rounds once too
            assert (y != module(x)).float().mean() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.usefixtures("small_blocks")
def test_wide_rows(kind, backend):
    width = 700 if backend == "triton" else 20001
    x, residual, grad_y, grad_sum = torch.randn(4, 6, width).unbind()
    weight, bias = vector(width, torch.float32), vector(width, torch.float32)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    with fk.use_backend(backend):
        y, summed = ours(kind, x, weight, bias, residual)
        mine = gradients((y, summed), (x, weight, bias), (grad_y, grad_sum))
        assert torch.equal(y, ours(kind, summed, weight, bias))
    exact_leaves = wide(summed), wide(weight), wide(bias)
    exact = eager(kind, *exact_leaves)
    cotangents = grad_y.double(), grad_sum.double()
    truths = gradients((exact, exact_leaves[0] * 1), exact_leaves, cotangents)
    torch.testing.assert_close(y, exact.float(), atol=3e-6, rtol=1e-6)
    for got, truth in zip(mine, truths, strict=True):
        if truth is not None:
            torch.testing.assert_close(got, truth.float(), atol=4e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.usefixtures("small_blocks")
def test_fused_equals_adding_first_to_the_bit(kind, backend, dtype):
    for width in (33, 300, 700):
        x, residual = rows_of(3, width, dtype=dtype), rows_of(3, width, dtype=dtype)
        weight, bias = vector(width, torch.float32), vector(width, torch.bfloat16)
        with fk.use_backend(backend):
            fused, summed = ours(kind, x, weight, bias, residual)
            alone = ours(kind, x + residual, weight, bias)
            grads = [gradients(y.sum(), (x, weight), None) for y in (fused, alone)]
        assert torch.equal(fused, alone)
        assert torch.equal(summed, x + residual)
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.usefixtures("small_blocks")
def test_a_row_has_the_same_bits_in_any_batch(kind, backend):
    for width, num_rows in ((64, 70), (300, 9), (700, 9)):
        x, residual, grad_y = torch.randn(3, num_rows, width).bfloat16().unbind()
        weight, bias = vector(width), vector(width)

        def run(rows, x=x, residual=residual, grad_y=grad_y, weight=weight, bias=bias):
            leaf = x[rows].requires_grad_()
            y, summed = ours(kind, leaf, weight, bias, residual[rows])
            return y, summed, gradients(y, (leaf,), grad_y[rows])[0]

        with fk.use_backend(backend):
            for rows in (slice(5, 6), slice(2, num_rows - 1)):
                for alone, among in zip(run(rows), run(slice(None)), strict=True):
                    assert torch.equal(alone, among[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.usefixtures("small_blocks")
def test_many_rows_add_up_in_one_order(kind, backend):
    """More tiles than programs, and more rows than a run: right, and the same bits twice."""
    x, grad_y = torch.randn(2, 400 if backend == "triton" else 5000, 8)
    weight, bias = vector(8, torch.float32), vector(8, torch.float32)
    exact_leaves = wide(x), wide(weight), wide(bias)
    truths = gradients(eager(kind, *exact_leaves), exact_leaves[1:], grad_y.double())
    with fk.use_backend(backend):
        y = ours(kind, x, weight, bias)
        grads = [gradients(y, (weight, bias), (grad_y,)) for y in (y, ours(kind, x, weight, bias))]
    for first, second, truth in zip(*grads, truths, strict=True):
        if truth is not None:
            assert torch.equal(first, second)
            torch.testing.assert_close(first, truth.float(), atol=2e-4, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_views_are_read_where_they_lie(kind, backend):
    """A slice of heads, a slice of columns, every other row, a transpose, an expanded row."""
    packed = torch.randn(6, 7 * 32, requires_grad=True)
    views = {
        "heads": lambda p: p.view(6, 7, 32)[:, 2:5],
        "columns": lambda p: p[:, 64:96],
        "rows": lambda p: p[::2, :32],
        "turned": lambda p: p[:, :6].t(),
        "heads first": lambda p: p.view(6, 7, 32).transpose(0, 1),
        "expanded": lambda p: p[:1, :32].expand(4, 32),
        "four dimensions": lambda p: p.view(2, 3, 7, 32)[:, :, ::2],
    }
    for name, view in views.items():
        width = view(packed).shape[-1]
        weight, bias = vector(width, torch.float32), vector(2 * width, torch.float32)[::2]
        residual = torch.randn(view(packed).shape)
        results = []
        with fk.use_backend(backend):
            for x in (view(packed), view(packed).contiguous()):
                y, summed = ours(kind, x, weight, bias, residual)
                alone = ours(kind, x, weight, bias)
                total = y.sum() + summed.sum() + alone.square().sum()
                results.append((y, summed, alone, *gradients(total, (packed, weight), None)))
        # The order of the definition's sums is torch's affair.
        exactly = {} if backend == "reference" else {"atol": 0, "rtol": 0}
        for strided, plain in zip(*results, strict=True):
            assert strided.is_contiguous()
            torch.testing.assert_close(strided, plain, **exactly, msg=name)


@pytest.mark.filterwarnings("ignore:overflow")  # which numpy tells under the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_small_and_constant_rows(backend):
    weight = torch.ones(96)
    with fk.use_backend(backend):
        for scale in (1e18, 1e-18, 0.0):
            x = torch.randn(2, 96) * scale
            for kind in ("rms", "layer"):
                y = ours(kind, x, weight, None)
                truth = eager(kind, x.double(), weight.double(), None)
                assert_error_rule(y, eager(kind, x, weight, None), truth, 2e-6)
        assert ours("rms", torch.full((1, 96), 1e30), weight, None).eq(0).all()  # as documented
        assert ours("layer", torch.full((1, 96), 3.0), weight, None).eq(0).all()
        shifted = torch.randn(2, 96) + 1000
        truth = eager("layer", shifted.double(), weight.double(), None)
        assert_error_rule(ours("layer", shifted, weight, None), truth.float(), truth, 2e-4)
        for kind in ("rms", "layer"):
            x = torch.randn(3, 96)
            x[1, 5] = torch.nan
            y = ours(kind, x, weight, None)
            assert y[1].isnan().all()
            assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_no_rows_and_one_row(kind, backend):
    weight, bias = vector(6, torch.float32), vector(6, torch.float32)
    with fk.use_backend(backend):
        x = torch.randn(0, 3, 6, requires_grad=True)
        y, summed = ours(kind, x, weight, bias, torch.randn(0, 3, 6))
        assert y.shape == summed.shape == x.shape
        grad_x, grad_weight = gradients(y.sum(), (x, weight), None)
        assert grad_x.shape == x.shape
        assert grad_weight.eq(0).all()
        row = torch.randn(6, requires_grad=True)
        y = ours(kind, row, weight, bias)
        assert torch.equal(y, ours(kind, row.unsqueeze(0), weight, bias)[0])
        single = gradients(y.sum(), (row, weight), None)
        lone = row.detach().unsqueeze(0).requires_grad_()
        batch = gradients(ours(kind, lone, weight, bias).sum(), (lone, weight), None)
        assert torch.equal(single[0], batch[0][0])
        assert torch.equal(single[1], batch[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_weights_and_their_gradients(backend):
    x = rows_of(4, 33, dtype=torch.bfloat16)
    for weight_dtype in (torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn):
        for bias_dtype in (torch.bfloat16, torch.float64, None):
            weight = vector(33, weight_dtype)
            bias = None if bias_dtype is None else vector(33, bias_dtype)
            with fk.use_backend(backend):
                y = ours("layer", x, weight, bias)
                leaves = [weight] if bias is None else [weight, bias]
                grads = gradients(y.sum(), leaves, None)
            assert y.dtype == torch.bfloat16
            assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
            truth = eager("layer", wide(x), wide(weight), None if bias is None else wide(bias))
            torch.testing.assert_close(y, truth.bfloat16(), atol=1e-6, rtol=8e-3)
            with fk.use_backend("reference"):
                wanted = gradients(ours("layer", x, weight, bias).sum(), leaves, None)
            for got, want in zip(grads, wanted, strict=True):  # an ulp apart where they round
                step = {torch.float8_e4m3fn: 2.0**-3, torch.float16: 2.0**-10}.get(got.dtype, 0.0)
                torch.testing.assert_close(
                    got.float(), want.float(), atol=1e-5, rtol=max(step, 8e-3)
                )


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_that_are_wanted(backend):
    x, residual = torch.randn(2, 3, 8).requires_grad_().unbind()
    weight, bias = vector(8, torch.float32), vector(8, torch.float32)
    with fk.use_backend(backend):
        frozen = ours("layer", x, weight.detach(), bias.detach(), residual)[0]
        trained = ours("layer", x, weight, bias, residual)[0]
        assert torch.equal(
            gradients(frozen.sum(), x, None)[0], gradients(trained.sum(), x, None)[0]
        )
        bias_alone = ours("layer", x.detach(), weight.detach(), bias)
        assert torch.equal(gradients(bias_alone.sum(), bias, None)[0], torch.full((8,), 3.0))
        _, summed = ours("rms", x, weight, None, residual)
        grads = gradients(summed.sum(), (x, residual, weight), None)
        assert all(g.eq(1).all() for g in grads[:2])
        assert grads[2] is None or grads[2].eq(0).all()
        assert not ours("rms", x.detach(), weight.detach(), None).requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_branch_and_stream_are_not_one_memory(backend):
    """They are equal, and whoever accumulates into one leaves the other alone."""
    x, stream = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    weight = vector(8, torch.float32)
    with fk.use_backend(backend):
        for _ in range(2):
            y, summed = ours("rms", x, weight, None, stream)
            (y.square().sum() + summed.sum()).backward()
        twice = stream.grad.clone()
        torch.testing.assert_close(x.grad, twice)
        x.grad.zero_()
        assert torch.equal(stream.grad, twice)
        # The same tensor on both sides is twice in the sum.
        y, summed = ours("rms", x, weight, None, x)
        (both,) = gradients(summed.sum(), x, None)
        assert both.eq(2).all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_second_derivative_is_refused(kind):
    x, weight = rows_of(2, 4), vector(4)
    (gradient,) = torch.autograd.grad(
        ours(kind, x, weight, None).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once more"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_may_change_before_backward(backend):
    x, weight = rows_of(3, 40, dtype=torch.float32), vector(40, torch.float32)
    expected = gradients(ours("layer", x, weight, None).square().sum(), (x, weight), None)
    with fk.use_backend(backend):
        loss = ours("layer", x, weight, None).square().sum()
    with fk.use_backend("reference"):
        torch.testing.assert_close(gradients(loss, (x, weight), None), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, residual = torch.randn(2, 3, 10, requires_grad=True), torch.randn(3, 10, requires_grad=True)
    weight, bias = vector(10, torch.float32), vector(10, torch.float32)
    grad = torch.randn(3, 10)
    with fk.use_backend(backend):
        for name, vectors in (("rms_norm", (weight, None)), ("layer_norm", (weight, bias))):
            opcheck(name, x, *vectors, None, EPS, 0.0)
            opcheck(name, x[0], *vectors, residual, EPS, 0.0)
            stats = torch.rand(2 if vectors[1] is not None else 1, 3)
            for grad_sum, weight_grad in ((None, True), (grad, False)):
                opcheck(f"{name}_bwd", x[0].detach(), weight.detach(),
                        None if vectors[1] is None else bias.detach(), stats, grad, grad_sum,
                        0.0, weight_grad)  # fmt: skip


def test_compiles_whole_with_sizes_that_change():
    def run(x, weight, bias, stream):
        y, stream = fk.rms_norm(x * 2, weight, residual=stream, weight_offset=1.0)
        return fk.layer_norm(y, weight, bias), stream

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    weight, bias = vector(9, torch.float32), vector(9, torch.float32)
    for num_rows in (3, 4, 7):
        x, stream = rows_of(2, num_rows, 9, dtype=torch.float32), torch.randn(2, num_rows, 9)
        results = []
        for function in (run, compiled):
            y, total = function(x, weight, bias, stream)
            grads = gradients((y.square() + total).sum(), (x, weight, bias), None)
            results.append((y, total, *grads))
        torch.testing.assert_close(*results)


def test_refused_input():
    x, weight = torch.randn(3, 8), torch.ones(8)
    calls = {
        "x must be a floating-point tensor": lambda: fk.rms_norm(x.long(), weight),
        "x must have shape": lambda: fk.rms_norm(torch.tensor(1.0), weight),
        r"x must have shape \[..., D\]": lambda: fk.layer_norm(torch.zeros(3, 0), torch.ones(0)),
        "weight must have shape": lambda: fk.rms_norm(x, torch.ones(7)),
        "weight must be a floating-point": lambda: fk.layer_norm(x, weight.int()),
        "bias must have shape": lambda: fk.layer_norm(x, weight, torch.ones(1, 8)),
        "residual must have shape": lambda: fk.rms_norm(x, weight, residual=x[:2]),
        "residual must be torch.float32": lambda: fk.layer_norm(x, weight, residual=x.half()),
        "eps must be": lambda: fk.rms_norm(x, weight, eps=-1e-6),
        "eps must be a finite": lambda: fk.layer_norm(x, weight, eps=float("nan")),
        "eps must be a number, not NoneType": lambda: fk.rms_norm(x, weight, eps=None),
        "eps must be a number, not str": lambda: fk.layer_norm(x, weight, eps="small"),
        "weight_offset must be": lambda: fk.rms_norm(x, weight, weight_offset=float("inf")),
        "weight must be on": lambda: fk.rms_norm(x, torch.ones(8, device="meta")),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()

"""glu against float64, PyTorch's activations and transformers' MLP, and its invariants."""

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import assert_error_rule, opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import native
from fuserl_kernels.glu import FORWARD
from fuserl_kernels.reference.glu import ACTIVATIONS, glu_fwd

BACKENDS = runnable(FORWARD)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 7), (2, 33), (5, 96), (1, 128), (2, 576), (2, 4097)]
TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
needs_native = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)


def with_gradient(function, gate_up, grad):
    leaf = gate_up.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, grad)


def peer(activation):
    def run(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return TORCH[activation](gate) * up

    return run


def assert_right(activation, gate_up, grad):
    ours = with_gradient(lambda x: fk.glu(x, activation=activation), gate_up, grad)
    theirs = with_gradient(peer(activation), gate_up, grad)
    truth = with_gradient(peer(activation), gate_up.double(), grad.double())
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == gate_up.dtype
        scale = float(exact.abs().max())
        assert_error_rule(mine, other, exact, 1e-7 * scale + 1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_definition_and_its_gradient(activation):
    gate_up = torch.randn(4, 14, dtype=torch.float64) * 2
    torch.testing.assert_close(glu_fwd(gate_up, activation), peer(activation)(gate_up))
    leaf = gate_up.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fk.glu(x, activation=activation), leaf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_no_more_than_torch(backend, activation, dtype):
    for num_rows, size in SIZES:
        gate_up = (torch.randn(num_rows, 2 * size) * 3).to(dtype)
        grad = torch.randn(num_rows, size).to(dtype)
        with fk.use_backend(backend):
            assert_right(activation, gate_up, grad)


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_instruction_set(instructions, activation, dtype):
    for num_rows, size in SIZES:
        gate_up = (torch.randn(num_rows, 2 * size) * 3).to(dtype)
        assert_right(activation, gate_up, torch.randn(num_rows, size).to(dtype))


def assert_pointwise(activation, gate):
    """Each value and slope by itself: to 1.2e-6 of the larger of itself and a thousandth of x."""
    gate_up = torch.cat((gate, torch.ones_like(gate))).unsqueeze(0)
    ours = with_gradient(
        lambda x: fk.glu(x, activation=activation), gate_up, torch.ones(1, len(gate))
    )
    exact = with_gradient(
        peer(activation), gate_up.double(), torch.ones(1, len(gate), dtype=torch.float64)
    )
    bound = 1.2e-6 * torch.maximum(exact[0].abs(), gate.abs().double() * 1e-3 + 1e-30)
    assert ((ours[0].double() - exact[0]).abs() <= bound + 2e-38).all()
    slopes = ours[1].double() - exact[1]
    assert (slopes[:, : len(gate)].abs() <= 1e-6).all()


@needs_native
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_magnitude(instructions, activation):
    sizes = torch.logspace(-37, 38, 4000)
    near = torch.linspace(-30, 30, 9001)
    assert_pointwise(activation, torch.cat((sizes, -sizes, near)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_huge_and_tiny_values(backend, activation):
    gate = torch.tensor([1e-38, 1e-20, 1e-3, 5.0, 90.0, 1e3, 1e10, 1e20, 3e38])
    with fk.use_backend(backend):
        assert_pointwise(activation, torch.cat((gate, -gate, torch.zeros(1))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_stays_where_it_is(backend, activation):
    gate_up = torch.randn(3, 2 * 40)
    gate_up[1, 7] = gate_up[2, 40 + 9] = torch.nan
    with fk.use_backend(backend):
        found = fk.glu(gate_up, activation=activation).isnan()
    assert found.nonzero().tolist() == [[1, 7], [2, 9]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_shapes_and_the_empty_batch(backend):
    gate_up = torch.randn(4, 3, 2 * 33)
    grad = torch.randn(3, 4, 33)
    with fk.use_backend(backend):
        whole = with_gradient(fk.glu, gate_up.transpose(0, 1).contiguous(), grad)
        for view in (
            gate_up.transpose(0, 1),
            torch.randn(3, 4, 80)[..., 5:71].copy_(gate_up.transpose(0, 1)),
            torch.randn(66, 3, 4).permute(1, 2, 0).copy_(gate_up.transpose(0, 1)),
        ):
            for wanted in (grad, grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
                for mine, other in zip(with_gradient(fk.glu, view, wanted), whole, strict=True):
                    assert torch.equal(mine, other)
        assert fk.glu(torch.randn(66)).shape == (33,)
        empty = with_gradient(fk.glu, torch.randn(0, 5, 6), torch.randn(0, 5, 3))
        assert [x.shape for x in empty] == [(0, 5, 3), (0, 5, 6)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone(backend, dtype):
    gate_up, grad = torch.randn(9, 2 * 200).to(dtype), torch.randn(9, 200).to(dtype)
    with fk.use_backend(backend):
        together = with_gradient(fk.glu, gate_up, grad)
        for rows in (slice(0, 1), slice(4, 6), slice(8, 9)):
            alone = with_gradient(fk.glu, gate_up[rows], grad[rows])
            for mine, other in zip(alone, together, strict=True):
                assert torch.equal(mine, other[rows])


@needs_native
def test_threads_change_no_bit():
    gate_up, grad = torch.randn(300, 2 * 700), torch.randn(300, 700)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(with_gradient(fk.glu, gate_up, grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    with fk.use_backend(backend):
        opcheck("glu", torch.randn(3, 10, requires_grad=True), "gelu_tanh")
        opcheck("glu_bwd", torch.randn(3, 10), torch.randn(3, 5), "silu")


def test_compiles_whole():
    def function(x):
        return fk.glu(x * 2, activation="gelu").square().sum()

    leaf = torch.randn(2, 3, 10, requires_grad=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (got,), (want,) = (
        torch.autograd.grad(compiled(leaf), leaf),
        torch.autograd.grad(function(leaf), leaf),
    )
    torch.testing.assert_close(got, want)


def test_no_second_derivative():
    leaf = torch.randn(2, 6, requires_grad=True)
    (first,) = torch.autograd.grad(fk.glu(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once more"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("activation", "theirs"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")]
)
def test_is_the_mlp_of_transformers(activation, theirs):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        hidden_act=theirs,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    mlp = llama.LlamaMLP(config)
    hidden = torch.randn(2, 5, 24)
    weight = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    ours = mlp.down_proj(fk.glu(hidden @ weight.t(), activation=activation))
    torch.testing.assert_close(ours, mlp(hidden))


@pytest.mark.parametrize(
    ("gate_up", "options", "named"),
    [
        (torch.randn(3, 5), {}, "gate_up"),
        (torch.randn(3, 0), {}, "gate_up"),
        (torch.tensor(1.0), {}, "gate_up"),
        (torch.ones(3, 4, dtype=torch.int64), {}, "gate_up"),
        (torch.randn(3, 4), {"activation": "swish"}, "activation"),
    ],
)
def test_bad_arguments_are_named(gate_up, options, named):
    with pytest.raises(ValueError, match=named):
        fk.glu(gate_up, **options)

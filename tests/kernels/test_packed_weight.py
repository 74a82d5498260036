"""Products with packed weights: right for every size, dtype, layout and instruction set, and every
number's bits its own row's and output's affair."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import assert_error_rule

from fuserl_kernels import native
from fuserl_kernels.packed_weight import PackedWeight

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = [1, 2, 3, 17, 64, 511, 512, 513, 1100]  # around the chain of 512, and odd
ROWS = [0, 1, 2, 7, 8, 9, 33]  # around each instruction set's tile
OUTPUTS = [1, 15, 17, 47, 48, 50]  # around panels of 16, and tiles of three


def operands(dtype, num_inputs, num_rows=33, num_outputs=50):
    """x, weight, bias"""
    x, weight = torch.randn(num_rows, num_inputs), torch.randn(num_outputs, num_inputs)
    return x.to(dtype), weight.to(dtype), torch.randn(num_outputs).to(dtype)


def assert_right(got, x, weight, bias):
    """A float32 sum of K products, in whatever order, errs by about 2^-24 of all they add up to."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    size = (wide[0].abs() @ wide[1].abs().T).max().item()
    narrow = [None if t is None else t.to(got.dtype) for t in (x, weight, bias)]
    assert_error_rule(got, F.linear(*narrow), F.linear(*wide), 2.0**-21 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_inputs", INPUTS)
def test_every_size(instructions, dtype, num_inputs):
    x, weight, given = operands(dtype, num_inputs)
    for bias in (None, given):
        whole = PackedWeight.of(weight).linear(x, bias)
        assert whole.dtype == dtype
        assert_right(whole, x, weight, bias)
        for m in OUTPUTS:
            packed = PackedWeight.of(weight[:m])
            for n in ROWS:
                got = packed.linear(x[:n], None if bias is None else bias[:m])
                assert torch.equal(got, whole[:n, :m])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("num_inputs", [1, 33, 513])
def test_narrow_operands_and_a_wide_result(instructions, dtype, num_inputs):
    x, weight, bias = operands(dtype, num_inputs)
    out = torch.empty(33, 50)
    assert PackedWeight.of(weight).linear(x, bias, out) is out
    assert_right(out, x, weight, bias)
    rounded = PackedWeight.of(weight).linear(x, bias)
    assert torch.equal(rounded, out.to(dtype)), "rounded once"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_in_a_wider_tensor(instructions, dtype):
    x, weight, bias = operands(dtype, 70)
    packed = PackedWeight.of(weight[:47])
    for out_dtype in {dtype, torch.float32}:
        wide = torch.full((33, 60), torch.nan, dtype=out_dtype)
        packed.linear(x, bias[:47], wide[:, 4:51])
        alone = packed.linear(x, bias[:47], torch.empty(33, 47, dtype=out_dtype))
        assert torch.equal(wide[:, 4:51], alone)
        assert wide[:, :4].isnan().all()
        assert wide[:, 51:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_inputs", [1, 2, 35, 514])
def test_any_layout_gives_the_same_bits(instructions, dtype, num_inputs):
    """Rows apart from one another, with NaN between them; both ways to pack; neither stride 1."""
    x, weight, bias = operands(dtype, num_inputs)
    want = PackedWeight.of(weight).linear(x, bias)
    room = torch.full((66, num_inputs + 3), torch.nan, dtype=dtype)
    apart = room[::2, 1 : num_inputs + 1].copy_(x)
    assert torch.equal(PackedWeight.of(weight).linear(apart, bias), want)
    columns = x.t().contiguous().t()
    assert torch.equal(PackedWeight.of(weight).linear(columns, bias), want)
    room = torch.full((100, num_inputs + 3), torch.nan, dtype=dtype)
    apart = room[::2, 1 : num_inputs + 1].copy_(weight)
    columns = weight.t().contiguous().t()
    scattered = torch.full((50, 2 * num_inputs), torch.nan, dtype=dtype)[:, ::2].copy_(weight)
    for same in (apart, columns, scattered):
        packed = PackedWeight.of(same)
        assert torch.equal(packed.panels, PackedWeight.of(weight).panels)
        assert torch.equal(packed.linear(x, bias), want)
    scattered = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)[:, 0]
    assert torch.equal(PackedWeight.of(weight).linear(x, scattered), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_threads(instructions, dtype):
    x, weight, bias = operands(dtype, 530, num_rows=300, num_outputs=131)
    packed = PackedWeight.of(weight)
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(packed.linear(x, bias))
            assert torch.equal(PackedWeight.of(weight).panels, packed.panels)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for row in (0, 7, 127, 128, 299):
        assert torch.equal(packed.linear(x[row : row + 1], bias), results[0][row : row + 1])
    order = torch.randperm(300)
    assert torch.equal(packed.linear(x[order], bias), results[0][order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_row_stays_alone(instructions, dtype, poison):
    """Of the inputs, and of the weight: also where a panel is filled up with zeros."""
    x, weight, _ = operands(dtype, 35)
    want = PackedWeight.of(weight[:47]).linear(x)
    broken = x.clone()
    broken[12] = poison
    got = PackedWeight.of(weight[:47]).linear(broken)
    others = torch.arange(33) != 12
    assert torch.equal(got[others], want[others])
    assert not got[12].isfinite().any()
    broken = weight[:47].clone()
    broken[20, 34] = poison
    got = PackedWeight.of(broken).linear(x)
    others = torch.arange(47) != 20
    assert torch.equal(got[:, others], want[:, others])
    assert not got[:, 20].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_its_size(dtype):
    """Panels of 16 outputs in words of four bytes, aligned for vectors of 64."""
    for num_outputs, num_inputs in ((1, 1), (16, 6), (50, 513), (0, 4), (3, 0)):
        packed = PackedWeight.of(torch.randn(num_outputs, num_inputs).to(dtype))
        words = num_inputs if dtype == torch.float32 else (num_inputs + 1) // 2
        assert packed.nbytes == -(-num_outputs // 16) * 16 * words * 4
        assert packed.panels.data_ptr() % 64 == 0
        got = packed.linear(torch.randn(5, num_inputs).to(dtype))
        assert got.shape == (5, num_outputs)
        if num_inputs == 0:
            assert not got.any(), "an empty sum"


def test_without_the_compiled_module_it_says_why(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda *_: (None, "the kernels are not usable"))
    with pytest.raises(RuntimeError, match="not usable"):
        PackedWeight.of(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x", (torch.zeros(2, 4),)),
        ("x", (torch.zeros(2, 5, dtype=torch.bfloat16),)),
        ("bias", (torch.zeros(2, 5), torch.zeros(2))),
        ("bias", (torch.zeros(2, 5), torch.zeros(3, dtype=torch.bfloat16))),
        ("out", (torch.zeros(2, 5), None, torch.zeros(2, 4))),
        ("out", (torch.zeros(2, 5), None, torch.zeros(2, 3, dtype=torch.float16))),
        ("out", (torch.zeros(2, 5), None, torch.zeros(3, 2).t())),
    ],
)
def test_what_does_not_fit_is_named(name: str, arguments: tuple) -> None:
    packed = PackedWeight.of(torch.ones(3, 5))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        packed.linear(*arguments)

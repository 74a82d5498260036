"""Products of full precision for every dtype, chunk sizes, and the promise of one product a row."""

import pytest
import torch
from kernel_testing import assert_error_rule

from fuserl_kernels import native, projection
from fuserl_kernels.linear_token_logprobs import KERNELS
from fuserl_kernels.projection import (
    FixedLogits,
    FixedProducts,
    Products,
    Projection,
    chunk_rows,
    fast_products,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
has_native = native.why_absent() is None
FIXED = [FixedProducts, FixedLogits] if has_native else []
KINDS = [Products, *FIXED]
needs_native = pytest.mark.skipif(not has_native, reason="native kernels are not built")


def operands(dtype, num_rows=5, vocab_size=70, hidden_size=33):
    hidden = torch.randn(num_rows, hidden_size).to(dtype)
    weight = torch.randn(vocab_size, hidden_size).to(dtype)
    return hidden, weight, torch.randn(vocab_size).to(dtype)


def weight_elements(dtype):
    return operands(dtype)[1].numel()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_the_whole_give_the_same_bits(dtype, monkeypatch):
    hidden, weight, bias = operands(dtype)
    found = []
    for most, tile in ((1 << 30, 1 << 22), (0, 33 * 16)):
        monkeypatch.setattr(projection, "_MAX_PACKED_BYTES", most)
        monkeypatch.setattr(projection, "_TILE_ELEMENTS", tile)
        found.append(torch.empty(5, 70))
        FixedProducts(weight, bias).logits(hidden, found[-1])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("tile_elements", [33 * 16, 1 << 22])
def test_logits_are_not_rounded_to_a_narrow_dtype(
    kind, dtype, with_bias, tile_elements, monkeypatch
):
    monkeypatch.setattr(projection, "_TILE_ELEMENTS", tile_elements)
    if tile_elements < weight_elements(dtype):  # a weight too large to be packed whole
        monkeypatch.setattr(projection, "_MAX_PACKED_BYTES", 0)
    hidden, weight, bias = operands(dtype)
    logits = torch.empty(5, 70)
    kind(weight, bias if with_bias else None).logits(hidden, logits)
    truth = hidden.double() @ weight.double().T + bias.double() * with_bias
    peer = hidden.float() @ weight.float().T + bias.float() * with_bias
    assert_error_rule(logits, peer, truth, 2.0**-21 * truth.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile_elements", [33 * 16, 1 << 22])
def test_gradients_behind_the_logits(kind, dtype, tile_elements, monkeypatch):
    monkeypatch.setattr(projection, "_TILE_ELEMENTS", tile_elements)
    if tile_elements < weight_elements(dtype):  # a weight too large to be packed whole
        monkeypatch.setattr(projection, "_MAX_PACKED_BYTES", 0)
    hidden, weight, bias = operands(dtype)
    products = kind(weight, bias)
    gradient = torch.randn(5, 70).to(products.gradient_dtype)
    narrow = products.gradient_dtype != torch.float32
    assert narrow == (kind is FixedLogits and dtype != torch.float32)
    near = torch.finfo(dtype).eps if narrow else 1e-6
    total = torch.full((70, 33), torch.nan)
    products.add_grad_weight(gradient, hidden, total, fresh=True)
    products.add_grad_weight(gradient, hidden, total, fresh=False)
    assert total.dtype == torch.float32
    truth = 2 * gradient.double().T @ hidden.double()
    assert (total - truth).abs().max() < near * truth.abs().max()
    truth = gradient.double() @ weight.double()
    got = products.grad_hidden(gradient).double()
    assert (got - truth).abs().max() < near * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_logit_stays_infinite(kind):
    hidden, weight, _ = operands(torch.bfloat16)
    hidden[0] = 1.0
    weight[3] = -torch.inf
    weight[4], hidden[1, 0] = 1.0, torch.nan
    logits = torch.empty(5, 70)
    kind(weight, None).logits(hidden, logits)
    assert logits[0, 3] == -torch.inf
    assert logits[0].isnan().sum() == 0
    assert logits[1].isnan().all()


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_chunk(kind, dtype, instructions):
    """Of the logits; in float32 of the gradient behind them too."""
    hidden, weight, bias = operands(dtype, num_rows=40, hidden_size=600)
    products = kind(weight, bias)
    whole = torch.empty(40, 70)
    products.logits(hidden, whole)
    back = FixedProducts(weight, bias) if dtype == torch.float32 else None
    for rows in (slice(0, 1), slice(3, 12), slice(39, 40)):
        part = torch.empty(rows.stop - rows.start, 70)
        products.logits(hidden[rows], part)
        assert torch.equal(part, whole[rows])
        if back is not None:
            assert torch.equal(back.grad_hidden(whole[rows]), back.grad_hidden(whole)[rows])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_units", [True, False])
def test_the_choice_for_a_cpu(dtype, has_units, monkeypatch):
    monkeypatch.setattr(projection, "_has_bf16_units", lambda: has_units)
    _, weight, bias = operands(dtype)
    narrow = has_units and dtype == torch.bfloat16
    assert type(fast_products(weight, bias)) is (FixedLogits if narrow else FixedProducts)
    assert type(fast_products(weight.double(), bias.double())) is Products
    monkeypatch.setattr(native, "_load", lambda *_: (None, "not built"))
    assert type(fast_products(weight, bias)) is Products


@needs_native
def test_a_narrow_gradient_lies_over_the_logits():
    hidden, weight, bias = operands(torch.bfloat16)
    chunks = Projection(
        KERNELS["reference"]._replace(products=FixedLogits), hidden, weight, bias, None
    )
    logits = chunks.logits(slice(0, 5))
    gradient = chunks.gradient_over(logits)
    assert gradient.dtype == torch.bfloat16
    assert gradient.shape == logits.shape
    assert [row.data_ptr() for row in gradient] == [row.data_ptr() for row in logits]


@pytest.mark.parametrize(
    ("vocab_size", "hidden_size", "rows"),
    [
        (128256, 1024, 384),  # 3/8 of the weight's gradient
        (128256, 64, 128),  # 64 MiB would be 130: a multiple of 64
        (151936, 8192, 1728),  # 1 GiB at most
        (1000, 16, 16768),
        (1 << 29, 8, 1),  # one row is more than the buffer should hold: still one row
    ],
)
def test_chunk_rows(vocab_size, hidden_size, rows):
    assert chunk_rows(vocab_size, hidden_size, 4, "cpu") == rows


@pytest.mark.parametrize(("vocab_size", "rows"), [(32000, 8384), (128256, 2048), (151936, 1728)])
def test_chunk_rows_of_a_gpu_fill_the_buffer(vocab_size, rows):
    assert chunk_rows(vocab_size, 1024, 4, "cuda") == rows


def test_no_row_is_left_over_or_done_twice():
    hidden, weight, bias = operands(torch.float32)
    chunks = Projection(KERNELS["reference"], hidden, weight, bias, None)
    chunks.capacity = 2
    assert chunks.slices(0, 5) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert chunks.slices(1, 3) == [slice(1, 3)]
    assert chunks.slices(0, 0) == []

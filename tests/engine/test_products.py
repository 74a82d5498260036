"""A decoder's products: torch's, in a fixed order, or with packed weights."""

import pytest
import torch
from packed import run
from random_models import ragged_prompts, scramble, scrambled
from torch import nn

import fuserl_kernels as fk
from fuserl.model.heads import LanguageModel
from fuserl.model.lora import adapters_off, add_lora, merged
from fuserl.model.products import (
    PackedProducts,
    fixed_product,
    linears,
    torch_product,
    training_product,
)
from fuserl_kernels import native

needs_native = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)
DTYPES = [torch.float32, torch.bfloat16]


def with_adapters() -> LanguageModel:
    """Some products with adapters that change them, some without."""
    model = scrambled("layer_norm_biases")
    add_lora(model, rank=3, alpha=6, targets=("q_proj", "v_proj", "down_proj"))
    return scramble(model)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_all_give_one_result(dtype: torch.dtype, bias: bool) -> None:
    linear, x = nn.Linear(33, 50, bias=bias).to(dtype), torch.randn(9, 33).to(dtype)
    packed = PackedProducts(nn.Sequential(linear), torch.randn(4, 5))
    with torch.no_grad():
        fixed = fixed_product(linear, x)
        assert torch.equal(packed(linear, x), fixed)
        assert torch.equal(packed(linear, x[4:5]), fixed[4:5])
        near = torch.finfo(dtype).eps
        torch.testing.assert_close(fixed, torch_product(linear, x), rtol=near, atol=2 * near)


@needs_native
def test_training_takes_the_fixed_order_where_it_is_compiled() -> None:
    linear, x = nn.Linear(600, 50), torch.randn(300, 600)
    part = slice(7, 8)
    ours = training_product(linear, x)
    assert torch.equal(ours, fixed_product(linear, x))
    assert torch.equal(training_product(linear, x[part]), ours[part])
    ours.sum().backward()
    assert linear.weight.grad is not None
    with fk.use_backend("reference"):
        assert torch.equal(training_product(linear, x), linear(x))
    with fk.use_backend("native"):
        assert torch.equal(training_product(linear, x), ours)
    wide = nn.Linear(6, 5).double()
    y = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(training_product(wide, y), wide(y))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_packed_weights_hold(dtype: torch.dtype) -> None:
    """Every product of the trunk and the head, each rounded up to panels of 16 outputs."""
    model = scrambled("layer_norm_biases", dtype)
    packed = PackedProducts(model.trunk, model.output_weight)
    weights = [linear.weight for linear in linears(model.trunk)]
    assert len(weights) == 4 * model.config.num_layers
    sizes = [
        -(-weight.shape[0] // 16) * 16 * weight.shape[1] * dtype.itemsize
        for weight in (*weights, model.output_weight)
    ]
    assert packed.num_bytes == sum(sizes)
    assert packed.head.num_outputs == model.config.vocab_size
    for linear in linears(model.trunk):
        assert (packed.of(linear).num_outputs, packed.of(linear).num_inputs) == linear.weight.shape


@needs_native
def test_a_copy_does_not_follow_its_weight() -> None:
    """Biases are read where they are."""
    linear, x = nn.Linear(8, 5), torch.randn(3, 8)
    trunk = nn.Sequential(linear)
    packed = PackedProducts(trunk, torch.randn(4, 5))
    with torch.no_grad():
        expected = x @ linear.weight.t()
        linear.weight.mul_(2)
        linear.bias.zero_()
        torch.testing.assert_close(packed(linear, x), expected)
        torch.testing.assert_close(PackedProducts(trunk, torch.randn(4, 5))(linear, x), linear(x))


@needs_native
@torch.no_grad()
def test_adapters_are_merged_where_they_are_on() -> None:
    model = with_adapters()
    whole = merged(model)
    pairs = list(zip(linears(model.trunk), linears(whole.trunk), strict=True))
    assert any(not torch.equal(ours.weight, theirs.weight) for ours, theirs in pairs)
    packed = PackedProducts(model.trunk, model.output_weight)
    expected = PackedProducts(whole.trunk, whole.output_weight)
    for ours, theirs in pairs:
        torch.testing.assert_close(
            packed(ours, torch.eye(ours.in_features)), expected(theirs, torch.eye(ours.in_features))
        )
    with adapters_off(model):
        packed = PackedProducts(model.trunk, model.output_weight)
    for ours, _ in pairs:
        x = torch.randn(3, ours.in_features)
        assert torch.equal(packed(ours, x), fk.fixed_linear(x, ours.weight, ours.bias))


def test_adapters_train_as_they_are() -> None:
    """Through their own module, with its own gradients; what has none keeps its order."""
    model = with_adapters()
    rows = ragged_prompts([5, 3])
    hidden = run(model, rows)
    hidden.square().sum().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("lora_a" in name for name in gradients)
    with torch.no_grad():
        torch.testing.assert_close(hidden, run(merged(model), rows), rtol=1e-4, atol=1e-4)

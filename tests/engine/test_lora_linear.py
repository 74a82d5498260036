"""A product with adapters against its formula in fp64: outputs, gradients, what it saves."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuserl.model.lora_linear import LoRALinear, Segment

QKV = (("q", 0, 12, 4, 8.0), ("k", 12, 18, 2, 2.0), ("v", 18, 24, 4, 8.0))
LAYOUTS = {
    "one": (("c", 0, 24, 4, 8.0),),
    "all three": QKV,
    "first and last": (QKV[0], QKV[2]),
    "middle": (QKV[1],),
}


def segments_of(name: str) -> list[Segment]:
    return [
        Segment(module=module, start=start, stop=stop, rank=rank, alpha=alpha)
        for module, start, stop, rank, alpha in LAYOUTS[name]
    ]


def adapted(
    layout: str | Sequence[Segment], *, bias: bool = True, dtype: torch.dtype = torch.float32
) -> LoRALinear:
    """A layer 10 -> 24 whose adapters do something."""
    segments = segments_of(layout) if isinstance(layout, str) else layout
    generator = torch.Generator().manual_seed(4)
    layer = LoRALinear(nn.Linear(10, 24, bias=bias, dtype=dtype), segments).reset(generator)
    with torch.no_grad():
        for b in layer.lora_b:
            b.normal_(generator=generator)
    return layer


def naive(layer: LoRALinear, x: Tensor) -> Tensor:
    """The formula, in the dtype of x."""
    y = F.linear(x, layer.weight, layer.bias)
    for segment, a, b in layer.adapters():
        delta = segment.scale * F.linear(F.linear(x, a), b)
        y = y + F.pad(delta, (segment.start, layer.out_features - segment.stop))
    return y


def run(forward: Callable[[Tensor], Tensor], layer: LoRALinear, x: Tensor) -> list[Tensor]:
    """Output, then the gradients of x, A and every B."""
    x = x.clone().requires_grad_(True)
    y = forward(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    (y * weights.cos().to(y.dtype)).sum().backward()
    found = [y.detach(), x.grad, layer.lora_a.grad, *(b.grad for b in layer.lora_b)]
    layer.zero_grad()
    assert all(tensor is not None for tensor in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layer_is_its_formula(layout: str, bias: bool) -> None:
    layer = adapted(layout, bias=bias)
    x = torch.randn(7, 10)
    wide = copy.deepcopy(layer).double()
    for ours, theirs in zip(
        run(layer, layer, x), run(lambda x: naive(wide, x), wide, x.double()), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), naive(layer, x))
        torch.testing.assert_close(layer(x.view(1, 7, 1, 10)), naive(layer, x).view(1, 7, 1, 24))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_double(layout: str) -> None:
    layer = adapted(layout, dtype=torch.float64)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(forward, (x, *values))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_products_with_fp32_adapters_err_no_more_than_torch_in_bf16(layout: str) -> None:
    layer = adapted(layout, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    x = torch.randn(64, 10).bfloat16()
    wide, half = copy.deepcopy(layer).double(), copy.deepcopy(layer).bfloat16()
    truth = run(lambda x: naive(wide, x), wide, x.double())
    theirs = run(lambda x: naive(half, x), half, x)
    ours = run(layer, layer, x)
    assert [tensor.dtype for tensor in ours[2:]] == [torch.float32] * (len(ours) - 2)
    for our, their, true in zip(ours, theirs, truth, strict=True):
        error = (our.double() - true).norm() / true.norm()
        assert error <= (their.double() - true).norm() / true.norm() + 1e-3


def test_only_what_trains_gets_a_gradient_and_only_what_it_needs_is_saved() -> None:
    layer = adapted("all three")
    x = torch.randn(7, 10, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    parameters = {p.data_ptr() for p in layer.parameters()}
    others = [t for t in saved if t.data_ptr() not in parameters and t.data_ptr() != x.data_ptr()]
    assert [tuple(t.shape) for t in others] == [(7, 10)]  # x A^T, of ranks 4 + 2 + 4
    y.sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_an_input_without_a_gradient_gets_none() -> None:
    layer = adapted("one")
    layer(torch.randn(7, 10)).sum().backward()
    assert layer.lora_a.grad is not None


def test_a_new_adapter_changes_no_bit() -> None:
    linear = nn.Linear(10, 24)
    layer = LoRALinear(linear, segments_of("all three")).reset(torch.Generator().manual_seed(0))
    x = torch.randn(7, 10)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    assert float(layer.lora_a.detach().abs().max()) <= 10**-0.5
    assert float(layer.lora_a.detach().var()) == pytest.approx(1 / 30, rel=0.5)


def test_a_merged_weight_is_rounded_once() -> None:
    layer = adapted("first and last", dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    truth = naive(wide, torch.eye(10, dtype=torch.float64)) - wide.bias
    before = layer.weight.clone()
    merged = layer.merged_weight()
    assert torch.equal(merged, truth.t().bfloat16())
    assert torch.equal(merged[12:18], layer.weight[12:18])
    assert torch.equal(layer.weight, before)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    plain = Segment(module="m", start=0, stop=4, rank=4, alpha=6.0)
    assert plain.scale == 1.5
    rooted = Segment(module="m", start=0, stop=4, rank=4, alpha=6.0, rslora=True)
    assert rooted.scale == pytest.approx(6.0 / math.sqrt(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "the rank of m must be positive, not 0"),
        ({"alpha": 0.0}, "alpha of m must be positive"),
        ({"alpha": math.nan}, "alpha of m must be positive"),
        ({"stop": 25}, "row ranges within 24"),
        ({"start": 4}, "row ranges within 24"),
    ],
)
def test_segments_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    settings = {"module": "m", "start": 0, "stop": 4, "rank": 2, "alpha": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        LoRALinear(nn.Linear(10, 24), [Segment(**settings)])


def test_a_weight_that_asks_for_a_gradient_is_refused() -> None:
    layer = adapted("one")
    layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen"):
        layer(torch.randn(2, 10))

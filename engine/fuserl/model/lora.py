"""A model with low-rank adapters: which of its modules have them, on and off, and merged.

Modules are named as in Hugging Face's model of the family, so that an adapter is the same adapter
in PEFT. All else in the model is frozen, but the head of a scalar model: it is new, and trains
as a whole.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fuserl.model.decoder import Decoder
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.lora_linear import LoRALinear, Segment
from fuserl.model.weights import pieces_of

ALL_LINEAR = "all-linear"
"""As targets: every product of the decoder."""

Model = LanguageModel | ScalarModel
AnyModel = TypeVar("AnyModel", bound=LanguageModel | ScalarModel)


@dataclass(frozen=True, slots=True)
class Target:
    """A module of Hugging Face's model that may have an adapter."""

    module: str  # its full name
    linear: str  # our product, by its name in our model
    start: int  # its rows there
    stop: int
    order: Tensor  # [stop - start] int64: where its row i lies, counted from start


def find_targets(model: Model) -> dict[str, Target]:
    """By Hugging Face's names: every product of the decoder, in its order. The embeddings and the
    vocabulary head are none."""
    if not isinstance(model.trunk, Decoder):
        raise ValueError(
            f"adapters need this engine's own decoder: {type(model.trunk).__name__} has none"
        )
    with torch.device("meta"):
        bare = LanguageModel(model.config)
    targets = {}
    for name, pieces in pieces_of(bare).items():
        linear, _, kind = name.rpartition(".")
        product = bare.get_submodule(linear)
        if kind != "weight" or not isinstance(product, nn.Linear) or "trunk" not in linear:
            continue
        for piece in pieces:
            rows = piece.view(torch.arange(product.out_features)).flatten()
            start, stop = int(rows.min()), int(rows.max()) + 1
            module = piece.name.removesuffix(".weight")
            targets[module] = Target(module, linear, start, stop, rows - start)
    return targets


def add_lora(
    model: Model,
    rank: int,
    alpha: float,
    targets: str | Sequence[str] = ALL_LINEAR,
    seed: int = 0,
    *,
    rslora: bool = False,
) -> None:
    """Give the model new adapters, in place, and freeze the rest. Its outputs stay as they are.

    targets: ends of Hugging Face's module names ("q_proj", "mlp.down_proj", "c_attn", ...), or
    "all-linear". alpha: what B A is multiplied by, over the rank (rslora: over its root). seed:
    of every A; B is zero.
    """
    segments = [
        (target, Segment(target.module, target.start, target.stop, rank, alpha, rslora))
        for target in _chosen(find_targets(model), targets)
    ]
    generator = torch.Generator().manual_seed(seed)
    for layer in put_adapters(model, segments):
        layer.reset(generator)


def _chosen(known: dict[str, Target], targets: str | Sequence[str]) -> list[Target]:
    if targets == ALL_LINEAR:
        return list(known.values())
    ends = (targets,) if isinstance(targets, str) else tuple(targets)
    if not ends:
        raise ValueError("targets must name at least one module")
    for end in ends:
        if not any(named(module, end) for module in known):
            leaves = dict.fromkeys(module.rsplit(".", 1)[-1] for module in known)
            raise ValueError(
                f"targets names {end!r}, which is no product of this model's layers "
                f"(known: {', '.join(leaves)}, or {ALL_LINEAR!r})"
            )
    return [t for module, t in known.items() if any(named(module, end) for end in ends)]


def named(module: str, end: str) -> bool:
    """Whether a dotted name is `end`, or ends in it after a dot."""
    return module == end or module.endswith(f".{end}")


def put_adapters(model: Model, segments: Iterable[tuple[Target, Segment]]) -> list[LoRALinear]:
    """Replace products by ones with adapters, whose A is not set and whose B is zero, and freeze
    the rest. Returns them in the decoder's order."""
    if find_adapters(model):
        raise ValueError("the model has adapters already: merge them first (lora.merged)")
    by_linear: dict[str, list[Segment]] = {}
    for target, segment in segments:
        by_linear.setdefault(target.linear, []).append(segment)
    freeze_base(model)
    layers = []
    for name, adapters in by_linear.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers.append(LoRALinear(linear, sorted(adapters, key=lambda segment: segment.start)))
        _set_module(model, name, layers[-1])
    return layers


def freeze_base(model: Model) -> None:
    """Freeze all but a scalar head: what adapters leave as it is."""
    model.trunk.requires_grad_(False)
    if isinstance(model, LanguageModel):
        model.requires_grad_(False)


def find_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The products with adapters, by their names in the model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, bit for bit: what it was before its adapters learned.
    ValueError for a model without adapters: it is no longer anything but itself."""
    layers = list(find_adapters(model).values())
    if not layers:
        raise ValueError("the model has no adapters to switch off")
    before = [layer.is_on for layer in layers]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer, was_on in zip(layers, before, strict=True):
            layer.is_on = was_on


def merged(model: AnyModel) -> AnyModel:
    """A plain model with the adapters added into its weights, all of it to be trained. It shares
    the storage of every parameter that has no adapter; the given model stays as it is, and is the
    result where it has none."""
    layers = find_adapters(model)
    if not layers:
        return model
    shared: dict[int, Tensor] = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    if isinstance(model, ScalarModel):
        shared |= {id(kept): kept for kept in model.kept_lm_head.values()}
    plain = copy.deepcopy(model, shared)
    for name, layer in layers.items():
        has_bias = layer.bias is not None
        linear = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
        linear.weight = nn.Parameter(layer.merged_weight())
        if has_bias:
            linear.bias = nn.Parameter(layer.bias.detach())
        _set_module(plain, name, linear)
    return plain


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

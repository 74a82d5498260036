"""Frozen layers keep nothing for a backward pass and change nothing of the others' gradients."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuserl.model.config import DecoderConfig
from fuserl.model.freezing import count_frozen, freeze_lowest, num_frozen
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.packing import Packing
from fuserl.model.steps import PackedStep

LENGTHS = (9, 1, 14, 5)
LAYERS = 4


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Of each storage that autograd keeps inside, weights and inputs included, by address."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def batch(vocab_size: int) -> tuple[Tensor, Packing]:
    generator = torch.Generator().manual_seed(1)
    packing = Packing.of(LENGTHS)
    return torch.randint(vocab_size, (sum(LENGTHS),), generator=generator), packing


def loss_of(model: LanguageModel | ScalarModel) -> Tensor:
    out = model(*batch(model.config.vocab_size))
    return (out * torch.sin(torch.arange(out.numel()).view(out.shape))).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(("frozen", "layers"), [(0, 0), (1, 1), (0.75, 3), (0.1, 0), (4, 4)])
def test_the_rest_trains_with_equal_gradients(
    make_model: Callable[..., LanguageModel], tie: bool, frozen: float, layers: int
) -> None:
    model = make_model(num_layers=LAYERS, tie_embeddings=tie)
    loss_of(model).backward()
    whole = gradients(model)
    assert freeze_lowest(model, frozen) == layers
    loss_of(model).backward()
    part = gradients(model)
    assert all(torch.equal(part[name], whole[name]) for name in part)
    kept = {f"trunk.layers.{i}." for i in range(layers)}
    kept |= {"trunk.embed_tokens."} if frozen else set()
    assert {name for name in whole if not name.startswith(tuple(kept))} == set(part)
    assert num_frozen(model.trunk) == layers


def test_a_head_tied_to_the_embeddings_is_frozen_with_them(
    make_model: Callable[..., LanguageModel],
) -> None:
    tied, untied = make_model(tie_embeddings=True), make_model(tie_embeddings=False)
    for model in (tied, untied):
        freeze_lowest(model, 1)
    assert not tied.output_weight.requires_grad
    assert untied.output_weight.requires_grad


def test_learned_positions_are_frozen(make_model: Callable[..., LanguageModel]) -> None:
    model = make_model(rope=None)
    freeze_lowest(model, 1)
    assert not model.trunk.embed_positions.weight.requires_grad
    model.trunk.embed_positions.requires_grad_(True)
    loss_of(model).backward()
    assert model.trunk.embed_positions.weight.grad is not None


def test_nothing_is_saved_below_the_lowest_trained_layer(
    make_model: Callable[..., LanguageModel],
) -> None:
    model = ScalarModel.on_trunk(make_model(num_layers=LAYERS), seed=1)
    token_ids, packing = batch(model.config.vocab_size)
    sizes = []
    for frozen in range(LAYERS + 1):
        freeze_lowest(model, frozen)
        with saved_bytes() as kept:
            stream = model.trunk.lower(token_ids, PackedStep(packing), frozen)
        assert stream.requires_grad == (frozen == 0)
        assert (kept == {}) == (frozen > 0)
        with saved_bytes() as kept:
            loss_of(model)
        sizes.append(sum(kept.values()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[LAYERS] < sizes[0] / 8


def test_the_next_run_thaws(make_model: Callable[..., LanguageModel]) -> None:
    model = make_model(num_layers=LAYERS)
    freeze_lowest(model, 3)
    freeze_lowest(model, 1)
    assert num_frozen(model.trunk) == 1
    freeze_lowest(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("frozen", [-1, 1.5, 5, float("nan")])
def test_what_cannot_be_frozen_is_refused(frozen: float) -> None:
    with pytest.raises(ValueError, match=f"frozen_layers .* up to 4.* got {frozen}"):
        count_frozen(4, frozen)


def test_another_kind_of_decoder_is_refused(sizes: DecoderConfig) -> None:
    class Other(nn.Module):
        config = sizes

    model = LanguageModel(sizes, Other())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"frozen_layers needs .* a Other does not"):
        freeze_lowest(model, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"parallel_residual": True, "norm": "layer"}])
@pytest.mark.parametrize("frozen", [0, 2])
def test_checkpointing_gives_equal_gradients(
    make_model: Callable[..., LanguageModel],
    dtype: torch.dtype,
    changes: dict[str, Any],
    frozen: int,
) -> None:
    model = ScalarModel.on_trunk(make_model(num_layers=LAYERS, **changes).to(dtype), seed=1)
    freeze_lowest(model, frozen)
    found = []
    for checkpointing in (False, True):
        model.trunk.checkpointing = checkpointing
        loss_of(model).backward()
        found.append(gradients(model))
    assert len(found[0]) > 10
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_checkpointing_keeps_what_stands_between_layers_alone(
    make_model: Callable[..., LanguageModel],
) -> None:
    model = ScalarModel.on_trunk(make_model(num_layers=LAYERS), seed=1)
    token_ids, packing = batch(model.config.vocab_size)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    sizes = {}
    for checkpointing in (False, True):
        model.trunk.checkpointing = checkpointing
        with saved_bytes() as kept:
            model.trunk(token_ids, packing)
        sizes[checkpointing] = sum(kept.values())
    stream = sum(LENGTHS) * model.config.hidden_size * 4
    # Branch and stream before each layer and the last norm's, with its statistics.
    assert sizes[True] <= (2 * LAYERS + 4) * stream + num_bytes
    assert sizes[True] < sizes[False] / 2

"""Partial training: the embeddings and the lowest layers stay as they are.

Autograd keeps nothing of what no trained parameter lies under, so the frozen part runs as it does
without gradients: no activation saved, no backward, no moments (see Optimizer).
"""

from torch import nn

from fuserl.model.decoder import Decoder
from fuserl.model.heads import LanguageModel, ScalarModel


def freeze_lowest(model: LanguageModel | ScalarModel, frozen: float) -> int:
    """Freeze the embeddings and the lowest layers; everything else trains.

    frozen: how many layers, or a share of them within (0, 1), rounded down; 0 freezes nothing, the
    embeddings neither. A head tied to the embeddings is frozen with them. Returns the number of
    frozen layers; ValueError where the model has fewer, or is not our decoder.
    """
    model.requires_grad_(True)
    if frozen == 0:
        return 0
    trunk = model.trunk
    if not isinstance(trunk, Decoder):
        raise ValueError(
            f"frozen_layers needs a family of our own decoder: a {type(trunk).__name__} does not "
            "say which layers are its lowest"
        )
    layers = count_frozen(len(trunk.layers), frozen)
    for part in (*_embeddings(trunk), *trunk.layers[:layers]):
        part.requires_grad_(False)
    return layers


def count_frozen(num_layers: int, frozen: float) -> int:
    """How many of `num_layers` a number or a share of them freezes."""
    if not 0 <= frozen <= num_layers or (frozen > 1 and frozen != int(frozen)):
        raise ValueError(
            f"frozen_layers must be a share below 1 or a whole number up to {num_layers}, the "
            f"model's layers; got {frozen}"
        )
    return int(frozen * num_layers if frozen < 1 else frozen)


def num_frozen(trunk: Decoder) -> int:
    """How many of the lowest layers need no gradient, in themselves or below: their output can be
    computed once and shared between models that agree so far."""
    if any(p.requires_grad for part in _embeddings(trunk) for p in part.parameters()):
        return 0
    for number, layer in enumerate(trunk.layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return number
    return len(trunk.layers)


def _embeddings(trunk: Decoder) -> list[nn.Module]:
    positions = [trunk.embed_positions] if trunk.config.rope is None else []
    return [trunk.embed_tokens, *positions]

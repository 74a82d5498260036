"""The rules between Hugging Face's weights and ours: names, rows laid together, transpositions.

Each tensor of ours is made of pieces, each a stored tensor and the view of ours that it fills:
loading copies into the view, saving reads it out, and neither changes a bit. What a piece is
called and how it is laid out is in its family's WeightNames.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.model.config import DecoderConfig
from fuserl.model.families import FAMILIES, PerHead, Transposed
from fuserl.model.heads import LanguageModel, ScalarModel

Shape = tuple[int, ...]

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
# Masks and frequencies that old checkpoints stored.
_NOT_WEIGHTS = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor."""

    name: str  # in a folder of its family
    shape: Shape
    view: Callable[[Tensor], Tensor]
    """Of the tensor of ours it is part of; its elements, in order, are those stored."""

    def write(self, ours: Tensor, stored: Tensor) -> None:
        """Copy what is stored into ours, in our dtype and on our device."""
        view = self.view(ours)
        view.copy_(stored.reshape(view.shape))

    def read(self, ours: Tensor) -> Tensor:
        """What is to be stored: contiguous, and part of ours where it lies there so."""
        return self.view(ours).reshape(self.shape).contiguous()


def pieces_of(model: LanguageModel | ScalarModel) -> dict[str, list[Piece]]:
    """The pieces of each tensor in the model's state dict, but for those transformers has no name
    for. The model may be on the meta device."""
    own = own_tensors(model)
    return {
        name: _pieces(model.config, name, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in own
    }


def own_tensors(model: LanguageModel | ScalarModel) -> frozenset[str]:
    """The names in the model's state dict that transformers has no name for: of a scalar head,
    its bias, and all of an MLP."""
    if isinstance(model, LanguageModel):
        return frozenset()
    if model.score_hidden is None:
        return frozenset(["score.bias"])
    return frozenset(name for name in model.state_dict() if name.startswith("score"))


def _pieces(config: DecoderConfig, name: str, shape: Shape) -> list[Piece]:
    names = FAMILIES[config.family].weights
    heads = {
        "score.weight": "score.weight",
        "lm_head.weight": f"{names.head}.weight",
        "lm_head_bias": f"{names.head}.bias",
    }
    if name in heads:
        return [Piece(heads[name], shape, _whole)]
    module, _, kind = name.removeprefix("trunk.").rpartition(".")
    prefix = names.prefix
    if layer := _LAYER.fullmatch(module):
        prefix, module = names.layers.format(layer[1]), layer[2]
    if module not in names.modules:
        raise ValueError(f"{name} has no name in the weights of a {config.family} model")
    stored = names.modules[module]
    if isinstance(stored, str):
        return [Piece(f"{prefix}{stored}.{kind}", shape, _whole)]
    if isinstance(stored, Transposed):
        return [Piece(f"{prefix}{stored.name}.{kind}", shape[::-1], Tensor.t)]
    if isinstance(stored, PerHead):
        return [Piece(f"{prefix}{stored.name}.{kind}", shape, _by_head(config))]
    pieces, start = [], 0
    for part, rows in zip(stored, _rows(config, module), strict=True):
        view = _row_slice(start, start + rows)
        pieces.append(Piece(f"{prefix}{part}.{kind}", (rows, *shape[1:]), view))
        start += rows
    return pieces


def _rows(config: DecoderConfig, module: str) -> tuple[int, ...]:
    """How many rows each part of a module has."""
    if module == "attn.qkv_proj":
        key = config.num_kv_heads * config.head_dim
        return config.num_heads * config.head_dim, key, key
    return config.intermediate_size, config.intermediate_size


def _whole(ours: Tensor) -> Tensor:
    return ours


def _row_slice(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda ours: ours[start:stop]


def _by_head(config: DecoderConfig) -> Callable[[Tensor], Tensor]:
    """[3, heads, head_dim, ...] of ours as [heads, 3, head_dim, ...]."""
    sizes = (3, config.num_heads, config.head_dim)
    return lambda ours: ours.unflatten(0, sizes).transpose(0, 1)


# Whole models


def hf_state(model: LanguageModel | ScalarModel) -> dict[str, Tensor]:
    """The weights by the names and in the layout of a folder of the model's family; may share
    memory with the model. Without what transformers has no name for."""
    state = model.state_dict()
    return {
        piece.name: piece.read(state[name].detach())
        for name, pieces in pieces_of(model).items()
        for piece in pieces
    }


@torch.no_grad()
def load_hf_state(model: LanguageModel | ScalarModel, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights as hf_state names them into the model, in its dtype and on its device; what
    transformers has no name for stays as it is. ValueError where one is missing or misshapen."""
    names = standard_names(tensors, model.config)
    state = model.state_dict()
    for name, pieces in pieces_of(model).items():
        for piece in pieces:
            if piece.name not in names:
                raise ValueError(f"{piece.name} {piece.shape} is missing")
            stored = tensors[names[piece.name]]
            if tuple(stored.shape) != piece.shape:
                raise ValueError(
                    f"{piece.name} has shape {tuple(stored.shape)}, but must have {piece.shape}"
                )
            piece.write(state[name], stored)


def standard_names(stored: Iterable[str], config: DecoderConfig) -> dict[str, str]:
    """The stored names by those of a language model's folder, without what is no weight.

    A base model's folder lacks the prefix; transformers calls every head in memory lm_head.
    """
    names = FAMILIES[config.family].weights
    stored = [name for name in stored if not _NOT_WEIGHTS.search(name)]
    has_prefix = any(name.startswith(names.prefix) for name in stored)
    heads = ("lm_head.", f"{names.head}.", "score.", "score_hidden.")
    standard = {}
    for name in stored:
        if name.startswith("lm_head."):
            standard[names.head + name.removeprefix("lm_head")] = name
        elif has_prefix or name.startswith(heads):
            standard[name] = name
        else:
            standard[names.prefix + name] = name
    return standard

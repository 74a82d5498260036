"""Hugging Face folders in and out: config.json, safetensors weights, and our own head file.

Everything a folder can have wrong is found before a weight is allocated: the names, shapes and
dtypes in the safetensors headers are compared with the model built on the meta device, and the
error names the file and the key. Nothing in a folder is ever executed: pickle weights and
remote code are refused.

Every tensor keeps its bits on the way in and out, and every key of config.json that a run does
not change its value.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuserl.model import fallback_config, fallback_folder
from fuserl.model.config import DecoderConfig
from fuserl.model.config_json import (
    CONFIG_FILE,
    GENERATION_FILE,
    config_to_hf,
    generation_to_hf,
    load_config,
)
from fuserl.model.entries import UnsupportedModel
from fuserl.model.fallback import FAMILY
from fuserl.model.families import FAMILIES
from fuserl.model.files import write_json
from fuserl.model.heads import HeadKind, LanguageModel, ScalarModel
from fuserl.model.stored import (
    CRITIC_FILE,
    FLOAT_DTYPES,
    HEAD_FILE,
    StoredTensor,
    read_header,
    read_headers,
    read_tensors,
    weights_source,
    write_tensors,
    write_weights,
)
from fuserl.model.weights import Piece, own_tensors, pieces_of, standard_names

_SCORE = ("score.", "score_hidden.")
_LABELS = ("id2label", "label2id", "num_labels")
_MAX_PROBLEMS = 6  # lines in one error; a wrong config gives one a tensor


def is_reward_model(folder: str | Path) -> bool:
    """Whether the folder holds a scalar head."""
    return any(name.startswith(_SCORE) for name in _stored(Path(folder)) if name != "score.bias")


def read_config(folder: str | Path) -> DecoderConfig:
    """As config_json.load_config, but a model that is no decoder of ours gets a config too: its
    family is fallback.FAMILY, and it runs through transformers."""
    try:
        return load_config(folder)
    except UnsupportedModel as reason:
        return fallback_config.read_config(Path(folder), reason)


def check_vocabulary(config: DecoderConfig, tokenizer_vocab_size: int, folder: str | Path) -> None:
    """Refuse a tokenizer with ids beyond the embedding. A smaller one is fine: vocabularies are
    padded to round sizes."""
    if tokenizer_vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer_vocab_size} tokens, but vocab_size in "
            f"{CONFIG_FILE} (the rows of the embedding) is {config.vocab_size}"
        )


# In


def load_language_model(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> LanguageModel:
    """device: None is the CPU. dtype: None keeps the one the weights are stored in.

    A reward model's folder works where the embeddings are tied, as they are the head, and where
    it kept the head of the model it started from. A model that is no decoder of ours runs
    through transformers.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.family == FAMILY:
        return fallback_folder.load_language_model(
            folder, config, _stored(folder), device=device, dtype=dtype
        )
    stored = _named(_stored(folder), config)
    with torch.device("meta"):
        model = LanguageModel(config)
    _check(config, _pieces(model), stored, folder)
    _fill(model, stored, device, dtype)
    return model


def load_scalar_model(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
    head: HeadKind = "linear",
    head_seed: int = 0,
) -> tuple[ScalarModel, bool]:
    """The model, and whether its head is new: True where the folder has none, and one of the
    kind `head` was drawn with head_seed. device, dtype: as in load_language_model."""
    folder = Path(folder)
    config = read_config(folder)
    if config.family == FAMILY:
        return fallback_folder.load_scalar_model(
            folder,
            config,
            _stored(folder),
            device=device,
            dtype=dtype,
            head=head,
            head_seed=head_seed,
        )
    stored = _named(_stored(folder), config)
    head_is_new = "score.weight" not in stored
    is_mlp = "score_hidden.weight" in stored
    is_language_model = config.source.get("architectures") == [
        FAMILIES[config.family].language_model
    ]
    orphans = [stored[name] for name in stored if name.startswith(_SCORE)]
    if orphans and (head_is_new or (is_mlp and is_language_model)):
        raise ValueError(
            f"{orphans[0].file} has {orphans[0].name}, but the weights of {folder} have no "
            f"score.weight of their own: two models are mixed in this folder"
        )
    if not head_is_new:
        head = "mlp" if is_mlp else "linear"
    with torch.device("meta"):
        model = ScalarModel(config, head)
        kept = _kept_head_pieces(config)
    new = {name for name in model.state_dict() if name.startswith("score")}
    optional = kept.keys() | (new if head_is_new else {"score.bias"})
    pieces = _pieces(model) | {name: [piece] for name, piece in kept.items()}
    _check(config, pieces, stored, folder, optional)
    _fill(model, stored, device, dtype)
    if head_is_new:
        model.initialize_head(head_seed)
    elif "score.bias" not in stored:
        torch.nn.init.zeros_(model.score.bias)

    def keep(name: str, tensor: Tensor) -> None:
        model.kept_lm_head[name] = tensor.to(dtype, copy=True)

    read_tensors(
        {name: stored[piece.name] for name, piece in kept.items() if piece.name in stored}, keep
    )
    return model, head_is_new


def _kept_head_pieces(config: DecoderConfig) -> dict[str, Piece]:
    """Of a language-model head that is not the embeddings, by its names in LanguageModel."""
    pieces = pieces_of(LanguageModel(config))
    return {name: found[0] for name, found in pieces.items() if not name.startswith("trunk.")}


def _stored(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the weights, and of our own file what they do not have."""
    weights = read_headers(folder)
    own = folder / HEAD_FILE
    return read_header(own) | weights if own.exists() else weights


def _named(stored: Mapping[str, StoredTensor], config: DecoderConfig) -> dict[str, StoredTensor]:
    """The stored tensors by their standard names."""
    return {name: stored[key] for name, key in standard_names(stored, config).items()}


def _pieces(model: LanguageModel | ScalarModel) -> dict[str, list[Piece]]:
    """Of all tensors: those transformers has no name for are stored as they are."""
    state = model.state_dict()
    own = {
        name: [Piece(name, tuple(state[name].shape), lambda ours: ours)]
        for name in own_tensors(model)
    }
    return pieces_of(model) | own


def _check(
    config: DecoderConfig,
    pieces: Mapping[str, list[Piece]],
    stored: Mapping[str, StoredTensor],
    folder: Path,
    optional: Collection[str] = (),
) -> None:
    """Compare the pieces a model is made of, by its own names, with what is stored. One error
    lists every problem, up to a handful. optional: those of its names that may be missing."""
    head = f"{FAMILIES[config.family].weights.head}."
    problems = []
    for name, parts in pieces.items():
        for piece in parts:
            if tensor := stored.get(piece.name):
                problems += _misfits(piece, tensor, config)
            elif name not in optional:
                is_head = piece.name.startswith(head)
                hint = " (no starting model left its language-model head)" if is_head else ""
                problems.append(
                    f"{weights_source(folder)}: {piece.name} {piece.shape} is missing{hint}"
                )
    known = {piece.name for parts in pieces.values() for piece in parts}
    for name, tensor in stored.items():
        if name not in known and not name.startswith((head, *_SCORE)):
            problems.append(
                f"{tensor.file}: {tensor.name} {tensor.shape} is not a tensor of this model"
            )
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        tail = [f"and {more} more"] if more > 0 else []
        raise ValueError(
            "\n".join([f"{folder} does not fit its config:", *problems[:_MAX_PROBLEMS], *tail])
        )


def _misfits(piece: Piece, tensor: StoredTensor, config: DecoderConfig) -> list[str]:
    """What is wrong with a stored tensor; nothing, for most."""
    if tensor.shape != piece.shape:
        names = FAMILIES[config.family].weights
        embedding = f"{names.prefix}{names.modules['embed_tokens']}."
        is_vocabulary = piece.name.startswith((embedding, f"{names.head}."))
        hint = f" (vocab_size {config.vocab_size})" if is_vocabulary else ""
        return [
            f"{tensor.file}: {tensor.name} has shape {tensor.shape}, but {CONFIG_FILE} "
            f"makes it {piece.shape}{hint}"
        ]
    if tensor.dtype not in FLOAT_DTYPES:
        known = ", ".join(FLOAT_DTYPES)
        return [f"{tensor.file}: {tensor.name} has dtype {tensor.dtype} (supported: {known})"]
    return []


@torch.no_grad()
def _fill(
    model: LanguageModel | ScalarModel,
    stored: Mapping[str, StoredTensor],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Allocate a model that was built on the meta device and copy its weights in. The copy
    leaves no parameter backed by the file, which may be replaced while the model lives."""
    all_pieces = _pieces(model)
    if dtype is None:
        embedding = all_pieces["trunk.embed_tokens.weight"][0].name
        dtype = FLOAT_DTYPES[stored[embedding].dtype]
    model.to(dtype).to_empty(device=device or "cpu")
    state = model.state_dict()
    targets = {
        piece.name: (piece, state[name])
        for name, pieces in all_pieces.items()
        for piece in pieces
        if piece.name in stored
    }

    def write(name: str, tensor: Tensor) -> None:
        piece, ours = targets[name]
        piece.write(ours, tensor)

    read_tensors({name: stored[name] for name in targets}, write)


# Out


def save_model(
    model: LanguageModel | ScalarModel,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that transformers opens. dtype: None keeps that of the parameters.
    max_shard_bytes: weights beyond it go to several files and an index.

    Files are replaced whole and weights at once, config.json last: a folder killed while it is
    first written has none, and does not load. Tokenizer files are not the model's, and not
    written here. ValueError if the model's family has no place for something the model has.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, not {dtype}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    if model.config.family == FAMILY:
        fallback_folder.save_model(
            model, Path(folder), dtype=dtype, max_shard_bytes=max_shard_bytes
        )
        return
    state = model.state_dict()
    stored_dtype = dtype or state["trunk.embed_tokens.weight"].dtype
    config = _config_of(model, stored_dtype)
    pieces = {
        piece.name: (piece, state[name])
        for name, found in pieces_of(model).items()
        for piece in found
    }

    def read(name: str) -> Tensor:
        piece, ours = pieces[name]
        return piece.read(ours.detach()).to("cpu", dtype)

    sizes = {
        name: (dtype or ours.dtype).itemsize * math.prod(piece.shape)
        for name, (piece, ours) in pieces.items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, ScalarModel):
        own = {name: state[name] for name in own_tensors(model)}
        with torch.device("meta"):
            names = _kept_head_pieces(model.config)
        own |= {names[name].name: tensor for name, tensor in model.kept_lm_head.items()}
        write_tensors(
            folder / HEAD_FILE,
            {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in own.items()},
        )
        stale = [folder / GENERATION_FILE]  # what another model may have left
    else:
        write_json(folder / GENERATION_FILE, generation_to_hf(model.config))
        stale = [folder / HEAD_FILE]
    write_weights(folder, sizes, read, max_shard_bytes)
    write_json(folder / CONFIG_FILE, config)
    for path in (*stale, folder / CRITIC_FILE):
        path.unlink(missing_ok=True)


def _config_of(model: LanguageModel | ScalarModel, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json."""
    family = FAMILIES[model.config.family]
    config = config_to_hf(model.config)
    config.pop("torch_dtype", None)  # what older folders call dtype
    config["dtype"] = str(dtype).removeprefix("torch.")
    for key in _LABELS:
        config.pop(key, None)
    if isinstance(model, ScalarModel):
        config["architectures"] = [family.classifier]
        config["id2label"] = {"0": "LABEL_0"}  # one label is how transformers says num_labels 1
        config["label2id"] = {"LABEL_0": 0}
    else:
        config["architectures"] = [family.language_model]
    return config

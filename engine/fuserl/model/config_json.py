"""config.json in and out: a DecoderConfig from it and back, by its family's entries."""

import dataclasses
from pathlib import Path
from typing import Any

from fuserl.model.config import DecoderConfig
from fuserl.model.entries import OLD_ROPE_KEYS, Fields, Raw, UnsupportedModel
from fuserl.model.families import FAMILIES
from fuserl.model.files import read_json

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_REFUSED = {
    "auto_map": "the model comes with code of its own, and no code from a model folder is run",
    "quantization_config": "quantised weights are not supported; use the unquantised model",
}
MAX_HEAD_DIM = 256
"""The attention kernels hold a head in registers."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder that folder/config.json describes.

    ValueError, naming file and key, if it is refused or wrong; UnsupportedModel if it is sound
    but no decoder of ours.
    """
    path = Path(folder) / CONFIG_FILE
    raw = read_json(path)
    for key, reason in _REFUSED.items():
        if raw.get(key):
            raise ValueError(f"{path}: {key} is refused: {reason}")
    try:
        config = config_from_hf(raw)
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    generation = Path(folder) / GENERATION_FILE
    if not generation.exists():
        return config
    return dataclasses.replace(config, generation=read_json(generation))


def config_from_hf(raw: Raw) -> DecoderConfig:
    """From the content of a config.json, which the result keeps as its source.

    ValueError, naming the key, if the content is wrong; UnsupportedModel if this decoder cannot
    run the model.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedModel(
            f"model_type {model_type!r} is not supported (supported: {', '.join(FAMILIES)})"
        )
    fields: Fields = {}
    for entry in FAMILIES[model_type].entries:
        fields |= entry.read(raw, fields)
    if (head_dim := fields["head_dim"]) % 2 or head_dim > MAX_HEAD_DIM:
        raise UnsupportedModel(
            f"head_dim {head_dim} is not supported: an even number up to {MAX_HEAD_DIM} is"
        )
    return DecoderConfig(family=model_type, source=dict(raw), **fields)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The content of a config.json, without `architectures` and `dtype`.

    Every key of the source stays as it is, unless what it says has changed. ValueError if the
    family has no key for something the config sets.
    """
    described = _describe(config)
    content = dict(config.source)
    if content:
        before = _describe(config_from_hf(content))
        described = {k: v for k, v in described.items() if k not in before or before[k] != v}
    if "rope_parameters" in described:
        content = {key: value for key, value in content.items() if key not in OLD_ROPE_KEYS}
    content |= described
    wanted, got = _meaning(config), _meaning(config_from_hf(content))
    for name in wanted:
        if wanted[name] != got[name]:
            raise ValueError(
                f"the config.json of a {config.family} model cannot say {name} {wanted[name]!r}: "
                f"it would be read as {got[name]!r}"
            )
    return content


def _meaning(config: DecoderConfig) -> dict[str, Any]:
    """The fields by what they do, where two spellings do the same."""
    meaning = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(config)
        if item.compare and item.name not in ("window", "window_layers", "rope", "local_rope")
    }
    meaning["attention_scale"] = config.scale
    meaning["windows"] = [config.window_of(layer) for layer in range(config.num_layers)]
    ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
    meaning["ropes"] = [
        rope and dataclasses.replace(rope, dim=config.head_dim if rope.dim is None else rope.dim)
        for rope in ropes
    ]
    return meaning


def _describe(config: DecoderConfig) -> dict[str, Any]:
    if config.family not in FAMILIES:
        raise ValueError(f"no family {config.family!r} (known: {', '.join(FAMILIES)})")
    content: dict[str, Any] = {"model_type": config.family}
    for entry in FAMILIES[config.family].entries:
        content |= entry.write(config)
    return content


def generation_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The content of generation_config.json: that of the source, with the token ids of the
    config where it does not list them already."""
    content = dict(config.generation)
    for key in TOKEN_IDS:
        token_id, listed = getattr(config, key), content.get(key)
        listed = listed if isinstance(listed, list) else [listed]
        if token_id is not None and token_id not in listed:
            content[key] = token_id
    return content

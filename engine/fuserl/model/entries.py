"""The parts a family's table entry is made of: how switches are spelled in config.json.

An Entry reads keys of config.json into fields of DecoderConfig, and writes them back. Spellings
are those of transformers 5; where older folders differ, both are read.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fuserl.model.config import DecoderConfig, Rope, RopeScaling

Raw = Mapping[str, Any]  # the content of config.json
Fields = dict[str, Any]  # fields of DecoderConfig


class UnsupportedModel(ValueError):
    """A sound config.json that asks for what this decoder lacks; the message names the key and
    its value. transformers' own module may know it."""


class Entry(Protocol):
    def read(self, raw: Raw, fields: Fields) -> Fields:
        """fields: what the entries before this one have read."""

    def write(self, config: DecoderConfig) -> dict[str, Any]: ...


REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class Value:
    """One key whose value is that of a field (or of several); an int is a size, and positive; a
    float is finite and not negative."""

    key: str
    fields: str | tuple[str, ...]
    kind: type
    default: Any = REQUIRED
    """Where the key is missing: the value, or a function of the fields before."""
    null: Any = REQUIRED
    """Where the key is null; unless given, null counts as missing."""
    is_divisor: bool = False  # 0 is no value either

    def read(self, raw: Raw, fields: Fields) -> Fields:
        value = self._value(raw, fields)
        names = (self.fields,) if isinstance(self.fields, str) else self.fields
        return dict.fromkeys(names, value)

    def _value(self, raw: Raw, fields: Fields) -> Any:
        optional = self.default is not REQUIRED
        if self.key in raw and not (raw[self.key] is None and optional):
            return typed(self.key, raw[self.key], self.kind, optional, self.is_divisor)
        is_null = self.key in raw and self.null is not REQUIRED
        default = self.null if is_null else self.default
        if default is REQUIRED:
            raise ValueError(f"key {self.key!r} is missing")
        return default(fields) if callable(default) else default

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        name = self.fields if isinstance(self.fields, str) else self.fields[0]
        return {self.key: getattr(config, name)}


def typed(
    key: str, value: Any, kind: type, optional: bool = False, is_divisor: bool = False
) -> Any:
    """The value, if it is of that kind (an int will do as a float) and in its range; else a
    ValueError."""
    kinds = (int, float) if kind is float else (kind,)
    if type(value) not in kinds:
        names = [each.__name__ for each in kinds] + ["null"] * optional
        raise ValueError(f"{key} must be {' or '.join(names)}, not {value!r}")
    if kind is int and value < 1:
        raise ValueError(f"{key} must be positive, not {value}")
    if kind is float and not (value >= 0 and math.isfinite(value) and (value or not is_divisor)):
        least = "positive" if is_divisor else "not negative"
        raise ValueError(f"{key} must be finite and {least}, not {value}")
    return float(value) if kind is float else value


@dataclass(frozen=True, slots=True)
class TokenId:
    """A key that holds a token id, null, or several of them, of which the first is taken."""

    key: str

    def read(self, raw: Raw, fields: Fields) -> Fields:
        value = raw.get(self.key)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and type(value) is not int:
            raise ValueError(f"{self.key} must be int or list or null, not {raw[self.key]!r}")
        return {self.key: value}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {self.key: getattr(config, self.key)}


@dataclass(frozen=True, slots=True)
class Choice:
    """A key with a few known values and the fields that each stands for; the first is written
    of those that fit. Any other value is unsupported."""

    key: str
    options: Mapping[Any, Fields]
    default: Any  # where the key is missing

    def read(self, raw: Raw, fields: Fields) -> Fields:
        value = raw.get(self.key, self.default)
        try:
            return dict(self.options[value])
        except (KeyError, TypeError):
            known = ", ".join(repr(option) for option in self.options)
            raise UnsupportedModel(
                f"{self.key} {value!r} is not supported (supported: {known})"
            ) from None

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        for value, fields in self.options.items():
            if all(getattr(config, name) == expected for name, expected in fields.items()):
                return {self.key: value}
        return {}


@dataclass(frozen=True, slots=True)
class Constant:
    """Fields that a family fixes, or computes from others, without a key."""

    fields: Mapping[str, Any]

    def read(self, raw: Raw, fields: Fields) -> Fields:
        return {
            name: value(fields) if callable(value) else value for name, value in self.fields.items()
        }

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, slots=True)
class AttentionScale:
    """Gemma 2's query_pre_attn_scalar: the scale to the power -2."""

    key: str = "query_pre_attn_scalar"
    default: int = 256

    def read(self, raw: Raw, fields: Fields) -> Fields:
        scalar = typed(self.key, raw.get(self.key, self.default), float, is_divisor=True)
        return {"attention_scale": scalar**-0.5}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        scalar = config.scale**-2
        whole = round(scalar)
        return {self.key: whole if whole > 0 and whole**-0.5 == config.scale else scalar}


# Rotary positions


OLD_ROPE_KEYS = (
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"),
    *("rotary_emb_base", "rotary_pct"),
)
"""What older folders have in the place of rope_parameters."""


@dataclass(frozen=True, slots=True)
class OneRope:
    """The same rotary positions in all layers."""

    default_theta: float = 10_000.0
    theta_key: str = "rope_theta"  # of older folders
    fraction_key: str = "partial_rotary_factor"  # of older folders
    default_fraction: float = 1.0
    is_partial: bool = False  # whether part of a head may rotate

    def read(self, raw: Raw, fields: Fields) -> Fields:
        defaults = {
            "rope_theta": _given(raw, self.theta_key, self.default_theta),
            "partial_rotary_factor": _given(raw, self.fraction_key, self.default_fraction),
        }
        stated = _dict(raw, "rope_scaling") or _dict(raw, "rope_parameters")
        return {"rope": _read_rope(defaults | stated, raw, fields, self.is_partial)}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        return {"rope_parameters": _write_rope(config, config.rope, self.is_partial)}


@dataclass(frozen=True, slots=True)
class TwoRopes:
    """Rotary positions of their own in the layers with a window (Gemma 3)."""

    default_theta: float = 1_000_000.0
    default_local_theta: float = 10_000.0

    def read(self, raw: Raw, fields: Fields) -> Fields:
        stated = _dict(raw, "rope_parameters")
        full = {"rope_theta": _given(raw, "rope_theta", self.default_theta)}
        full |= _dict(stated, "full_attention") | _dict(raw, "rope_scaling")
        local = {"rope_theta": _given(raw, "rope_local_base_freq", self.default_local_theta)}
        local |= _dict(stated, "sliding_attention")
        rope = _read_rope(full, raw, fields)
        local_rope = _read_rope(local, raw, fields)
        return {"rope": rope, "local_rope": None if local_rope == rope else local_rope}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        local = config.rope if config.local_rope is None else config.local_rope
        ropes = {"full_attention": config.rope, "sliding_attention": local}
        return {"rope_parameters": {key: _write_rope(config, rope) for key, rope in ropes.items()}}


@dataclass(frozen=True, slots=True)
class LeadingPairs:
    """rotary_dim dimensions of a head rotate, in pairs of neighbours (GPT-J)."""

    key: str = "rotary_dim"
    default: int = 64

    def read(self, raw: Raw, fields: Fields) -> Fields:
        if (dim := raw.get(self.key, self.default)) is None or dim == 0:
            raise UnsupportedModel(f"{self.key} {dim!r} is not supported")
        typed(self.key, dim, int)
        return {"rope": Rope(dim=None if dim == fields["head_dim"] else dim, interleaved=True)}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        if config.rope is None:
            return {}
        return {self.key: config.head_dim if config.rope.dim is None else config.rope.dim}


def _given(raw: Raw, key: str, default: float) -> Any:
    """The value at a key; null counts as missing."""
    value = raw.get(key)
    return default if value is None else value


def _dict(raw: Raw, key: str) -> dict[str, Any]:
    """The object at a key without its nulls; empty where there is none."""
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key} must be dict or null, not {value!r}")
    return {name: item for name, item in (value or {}).items() if item is not None}


def _read_rope(
    parameters: dict[str, Any], raw: Raw, fields: Fields, is_partial: bool = False
) -> Rope:
    fraction = typed("partial_rotary_factor", parameters.pop("partial_rotary_factor", 1.0), float)
    if fraction != 1 and not is_partial:
        raise UnsupportedModel(f"partial_rotary_factor {fraction} is not supported")
    dim = int(fields["head_dim"] * fraction)
    if dim % 2:
        raise UnsupportedModel(f"partial_rotary_factor {fraction} is not supported: {dim} is odd")
    return Rope(
        theta=typed("rope_theta", parameters["rope_theta"], float, is_divisor=True),
        dim=None if dim == fields["head_dim"] else dim,
        scaling=_read_scaling(parameters, raw, fields),
    )


def _read_scaling(parameters: Raw, raw: Raw, fields: Fields) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedModel(
            f"rope type {kind!r} is not supported (supported: 'default', 'linear', 'llama3', "
            f"'yarn')"
        )

    def number(key: str, default: float | None = None) -> float:
        if key not in parameters and default is None:
            raise ValueError(f"the rope parameters of type {kind!r} have no {key!r}")
        name, value = f"{key} of the rope parameters", parameters.get(key, default)
        checked: float = typed(name, value, float, is_divisor=key == "factor")
        return checked

    if kind == "linear":
        return RopeScaling(kind="linear", factor=number("factor"))
    original = raw.get("original_max_position_embeddings") or parameters.get(
        "original_max_position_embeddings", fields["max_positions"]
    )
    typed("original_max_position_embeddings", original, int)
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=number("factor"),
            original_max_positions=original,
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    factor = number("factor", fields["max_positions"] / original)
    attention_factor = number("attention_factor") if "attention_factor" in parameters else None
    if attention_factor is None and parameters.get("mscale") and parameters.get("mscale_all_dim"):
        top, bottom = (_mscale(factor, number(key)) for key in ("mscale", "mscale_all_dim"))
        attention_factor = top / bottom
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=bool(parameters.get("truncate", True)),
    )


def _mscale(factor: float, mscale: float) -> float:
    """YaRN's attention factor, with DeepSeek's weight."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _write_rope(
    config: DecoderConfig, rope: Rope | None, is_partial: bool = False
) -> dict[str, Any] | None:
    if rope is None:
        return None
    scaling = rope.scaling
    kind = "default" if scaling is None else scaling.kind
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.theta}
    if is_partial:
        dim = config.head_dim if rope.dim is None else rope.dim
        parameters["partial_rotary_factor"] = dim / config.head_dim
    if scaling is None:
        return parameters
    parameters["factor"] = scaling.factor
    if scaling.kind == "linear":
        return parameters
    parameters["original_max_position_embeddings"] = scaling.original_max_positions
    if scaling.kind == "llama3":
        names: tuple[str, ...] = ("low_freq_factor", "high_freq_factor")
    else:
        names = ("beta_fast", "beta_slow", "truncate")
        if scaling.attention_factor is not None:
            names += ("attention_factor",)
    return parameters | {name: getattr(scaling, name) for name in names}


# Windows


@dataclass(frozen=True, slots=True)
class Windows:
    """sliding_window and the layers that have it, by layer_types."""

    default: int = 4096
    layers: Callable[[Raw, int], bool] = lambda raw, layer: True
    """Whether a layer has the window, where there are no layer_types."""
    has_types: bool = True  # whether the family knows layer_types
    switch: str | None = None  # a key that must be true for any window

    def read(self, raw: Raw, fields: Fields) -> Fields:
        num_layers = fields["num_layers"]
        window = raw.get("sliding_window", self.default)
        if self.switch is not None and not raw.get(self.switch):
            window = None
        if window is not None:
            typed("sliding_window", window, int)
        stated = raw.get("layer_types")
        if stated is None:
            has = tuple(window is not None and self.layers(raw, i) for i in range(num_layers))
        else:
            if not isinstance(stated, list) or len(stated) != num_layers:
                raise ValueError(f"layer_types must name {num_layers} layers, not {stated!r}")
            known = ("full_attention", "sliding_attention")
            if odd := [kind for kind in stated if kind not in known]:
                raise UnsupportedModel(f"layer_types {odd[0]!r} is not supported")
            has = tuple(kind == "sliding_attention" for kind in stated)
            if any(has) and window is None:
                raise UnsupportedModel("layer_types 'sliding_attention' without a sliding_window")
            if not self.has_types and not all(has) and window is not None:
                raise UnsupportedModel(f"layer_types {stated!r} is not supported")
        if not any(has):
            return {"window": None, "window_layers": None}
        return {"window": window, "window_layers": None if all(has) else has}

    def write(self, config: DecoderConfig) -> dict[str, Any]:
        has = [config.window_of(layer) is not None for layer in range(config.num_layers)]
        entries: dict[str, Any] = {"sliding_window": config.window if any(has) else None}
        if self.switch is not None:
            entries[self.switch] = any(has)
        if self.has_types:
            entries["layer_types"] = [
                "sliding_attention" if one else "full_attention" for one in has
            ]
        return entries

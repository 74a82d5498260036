"""What a decoder is made of: the switches of one transformer, and how Hugging Face spells them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a Llama-style decoder. Sizes count elements, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """From the contents of a Hugging Face config.json.

        Raises ValueError, naming the key, for an architecture or a switch this decoder lacks.
        """
        model_type = config.get("model_type")
        if model_type != "llama":
            raise ValueError(f"model_type {model_type!r} is not supported (supported: 'llama')")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported (only 'silu')")
        # transformers 5 writes rope_parameters; older folders rope_theta and rope_scaling.
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"rope type {rope_type!r} is not supported (only 'default')")
        try:
            num_heads = config["num_attention_heads"]
            return cls(
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=config.get("num_key_value_heads") or num_heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
                max_positions=config.get("max_position_embeddings", 2048),
                rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
                rms_norm_eps=config.get("rms_norm_eps", 1e-6),
                attention_bias=config.get("attention_bias", False),
                mlp_bias=config.get("mlp_bias", False),
                tie_embeddings=config.get("tie_word_embeddings", False),
                init_std=config.get("initializer_range", 0.02),
                bos_token_id=config.get("bos_token_id"),
                eos_token_id=_first(config.get("eos_token_id")),
                pad_token_id=config.get("pad_token_id"),
            )
        except KeyError as error:
            raise ValueError(f"key {error} is missing") from None

    def to_hf(self) -> dict[str, Any]:
        """The config.json entries that describe this decoder (without `architectures`)."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }


def _first(token_id: int | list[int] | None) -> int | None:
    if isinstance(token_id, list):
        return token_id[0] if token_id else None
    return token_id


_SMALL: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "num_layers": 2, "num_heads": 3, "vocab_size": 512},
    "small": {"hidden_size": 192, "num_layers": 4, "num_heads": 6, "vocab_size": 4096},
    "medium": {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "vocab_size": 16_384},
}
"""Named configurations to train from scratch: about 0.3, 2.6 and 34 million parameters."""

SMALL_NAMES = tuple(_SMALL)


def small_config(name: str, vocab_size: int | None = None) -> DecoderConfig:
    """One of SMALL_NAMES, with another vocabulary size if given."""
    if name not in _SMALL:
        raise ValueError(f"no configuration named {name!r} (known: {', '.join(_SMALL)})")
    sizes = dict(_SMALL[name])
    hidden, num_heads = sizes["hidden_size"], sizes["num_heads"]
    config = DecoderConfig(
        intermediate_size=-(-hidden * 8 // 3 // 32) * 32,
        num_kv_heads=num_heads,
        head_dim=hidden // num_heads,
        init_std=hidden**-0.5,  # at these widths the usual 0.02 makes learning slow to start
        **sizes,
    )
    return config if vocab_size is None else dataclasses.replace(config, vocab_size=vocab_size)

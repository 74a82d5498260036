"""What a decoder is made of: the switches of one transformer. How each family of Hugging Face
models sets them is in families.py."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length a model was first trained on.

    linear: every frequency over `factor` (Chen et al., 2023). llama3: low frequencies over
    `factor`, high ones kept, a smooth blend between (Llama 3.1). yarn: a blend by wavelength and
    an attention factor (Peng et al., 2023).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 8192
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1
    truncate: bool = True  # yarn: the blend's ends are rounded to whole dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions (Su et al., 2021)."""

    theta: float = 10_000.0
    dim: int | None = None  # leading dimensions of a head that rotate; None: all
    interleaved: bool = False  # pairs (2i, 2i + 1), as GPT-J; else (i, i + dim / 2)
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a decoder. Sizes count elements, not bytes."""

    family: str = "llama"  # a name of families.FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048

    rope: Rope | None = Rope()  # None: learned positions
    local_rope: Rope | None = None  # of the layers with a window, where it differs

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_weight_offset: float = 0.0  # 1: the weight is stored less one (Gemma)
    qk_norm: bool = False  # RMS norm of each query and key head before the rotation
    post_norms: bool = False  # a norm behind attention and MLP too (Gemma 2)
    parallel_residual: bool = False  # attention and MLP read the same stream (NeoX, GPT-J)
    shared_norm: bool = False  # ... through one norm (GPT-J)

    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output product
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Activation = "silu"

    window: int | None = None  # tokens a query sees, itself included
    window_layers: tuple[bool, ...] | None = None  # which layers have it; None: all
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores -> softcap * tanh(scores / softcap)
    final_softcap: float | None = None  # the same of the logits
    embedding_scale: float = 1.0
    tie_embeddings: bool = True
    head_bias: bool = False  # of the language-model head (GPT-J)

    init_std: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The config.json this came from: saving writes its other keys back unchanged."""
    generation: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The generation_config.json beside it, likewise."""

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
            *("head_dim", "max_positions"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        for rope in (self.rope, self.local_rope):
            rotary_dim = 0 if rope is None else self.head_dim if rope.dim is None else rope.dim
            if rotary_dim % 2 or rotary_dim > self.head_dim:
                raise ValueError(
                    f"the rotary dimensions must be an even number within head_dim "
                    f"({self.head_dim}), not {rotary_dim}"
                )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be positive, not {self.window}")
        if self.window_layers is not None and len(self.window_layers) != self.num_layers:
            raise ValueError(
                f"window_layers has {len(self.window_layers)} entries for {self.num_layers} layers"
            )

    @property
    def scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def window_of(self, layer: int) -> int | None:
        """The window of one layer; None: it sees all tokens before."""
        has = self.window_layers is None or self.window_layers[layer]
        return self.window if has else None

    def rope_of(self, layer: int) -> Rope | None:
        """The rotary positions of one layer."""
        if self.local_rope is not None and self.window_of(layer) is not None:
            return self.local_rope
        return self.rope


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

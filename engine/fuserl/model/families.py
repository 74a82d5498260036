"""The families of models this decoder runs: how each spells its config.json and its weights.

A new family is one more entry of FAMILIES, made of the parts in entries.py (its config.json) and
of the layouts below (its weights). What an entry does not know, it refuses: a model of an unknown
type, or with a switch this decoder lacks, is an UnsupportedModel.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fuserl.model.entries import (
    AttentionScale,
    Choice,
    Constant,
    Entry,
    Fields,
    LeadingPairs,
    OneRope,
    Raw,
    TokenId,
    TwoRopes,
    Value,
    Windows,
)


@dataclass(frozen=True, slots=True)
class Transposed:
    """A stored module with its weight as [in, out] (GPT-2's Conv1D)."""

    name: str


@dataclass(frozen=True, slots=True)
class PerHead:
    """A stored module whose rows are query, key and value of head 0, then of head 1, ..."""

    name: str


Stored = str | tuple[str, ...] | Transposed | PerHead
"""Where a module of ours is stored: as it is, its rows in several modules, or laid out anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Hugging Face's names of our modules. A layer's are without the layer."""

    prefix: str  # of all but the head
    layers: str  # of a layer's, {} for its number
    modules: Mapping[str, Stored]
    head: str = "lm_head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    language_model: str  # its class in transformers
    classifier: str
    entries: tuple[Entry, ...]
    """Read in this order."""
    weights: WeightNames


# config.json


def _ungrouped_head_dim(fields: Fields) -> int:
    hidden, num_heads = fields["hidden_size"], fields["num_heads"]
    if hidden % num_heads:
        raise ValueError(
            f"the hidden size ({hidden}) must be a multiple of the heads ({num_heads})"
        )
    return int(hidden // num_heads)


def _num_heads(fields: Fields) -> int:
    return int(fields["num_heads"])


def _count(raw: Raw, key: str, default: int, least: int = 0) -> int:
    value = raw.get(key, default)
    if type(value) is not int or value < least:
        raise ValueError(f"{key} must be int and at least {least}, not {value!r}")
    return value


def _has_pattern_window(raw: Raw, layer: int) -> bool:
    """Gemma 3: all layers but every sixth, or as the config says."""
    return (layer + 1) % _count(raw, "sliding_window_pattern", 6, least=1) > 0


_SILU = {"silu": {"activation": "silu"}, "swish": {"activation": "silu"}}
_GELU_NEW = {"gelu_new": {"activation": "gelu_tanh"}}
_TANH = {"gelu_pytorch_tanh": {"activation": "gelu_tanh"}} | _GELU_NEW
_ERF = {"gelu": {"activation": "gelu"}}
_RELU = {"relu": {"activation": "relu"}}
_LLAMA_ACTIVATION = Choice("hidden_act", _SILU | _TANH | _ERF | _RELU, "silu")
_GPT_ACTIVATION = Choice(
    "activation_function", _GELU_NEW | _TANH | _ERF | _RELU | _SILU, "gelu_new"
)
_TOKEN_IDS = (TokenId("bos_token_id"), TokenId("eos_token_id"), TokenId("pad_token_id"))
_INIT = Value("initializer_range", "init_std", float, 0.02)
_CAUSAL = Choice("use_bidirectional_attention", {None: {}, False: {}}, None)


def _llama_like(
    *rest: Entry,
    head_dim: Any = lambda fields: fields["hidden_size"] // fields["num_heads"],
    kv_heads: Any = _num_heads,
    max_positions: int = 2048,
    activation: Choice = _LLAMA_ACTIVATION,
    tied: bool = False,
) -> tuple[Entry, ...]:
    """What Llama and those after it share."""
    return (
        Value("vocab_size", "vocab_size", int),
        Value("hidden_size", "hidden_size", int),
        Value("intermediate_size", "intermediate_size", int),
        Value("num_hidden_layers", "num_layers", int),
        Value("num_attention_heads", "num_heads", int),
        Value("num_key_value_heads", "num_kv_heads", int, kv_heads, null=_num_heads),
        Value("head_dim", "head_dim", int, head_dim),
        Value("max_position_embeddings", "max_positions", int, max_positions),
        Value("rms_norm_eps", "norm_eps", float, 1e-6),
        Value("tie_word_embeddings", "tie_embeddings", bool, tied),
        Constant({"norm": "rms", "gated_mlp": True}),
        activation,
        *rest,
        _INIT,
        *_TOKEN_IDS,
    )


_ATTENTION_BIAS = Value("attention_bias", ("qkv_bias", "output_bias"), bool, False)
_QWEN_WINDOWS = Windows(
    layers=lambda raw, layer: layer >= _count(raw, "max_window_layers", 28),
    switch="use_sliding_window",
)


def _gemma_like(*rest: Entry, head_dim: int = 256, **settings: Any) -> tuple[Entry, ...]:
    """Norm weights stored less one, embeddings scaled, tied unless stated."""
    return _llama_like(
        Constant(
            {
                "norm_weight_offset": 1.0,
                "embedding_scale": lambda fields: fields["hidden_size"] ** 0.5,
            }
        ),
        _ATTENTION_BIAS,
        _CAUSAL,
        *rest,
        head_dim=head_dim,
        tied=True,
        **settings,
    )


def _softcap(key: str, field: str, default: float | None) -> Value:
    return Value(key, field, float, default, null=None, is_divisor=True)


_GEMMA2_ACTIVATION = Choice("hidden_activation", _TANH | _SILU | _ERF | _RELU, "gelu_pytorch_tanh")


def _gpt_like(*rest: Entry, tied: bool) -> tuple[Entry, ...]:
    """GPT-2 and GPT-J: layer norms with biases, an MLP without a gate."""
    return (
        Value("vocab_size", "vocab_size", int),
        Value("n_embd", "hidden_size", int),
        Value("n_inner", "intermediate_size", int, lambda fields: 4 * fields["hidden_size"]),
        Value("n_layer", "num_layers", int),
        Value("n_head", "num_heads", int),
        Value("n_positions", "max_positions", int),
        Value("layer_norm_epsilon", "norm_eps", float, 1e-5),
        Value("tie_word_embeddings", "tie_embeddings", bool, tied),
        Constant({"num_kv_heads": _num_heads, "head_dim": _ungrouped_head_dim}),
        Constant({"norm": "layer", "gated_mlp": False, "mlp_bias": True}),
        _GPT_ACTIVATION,
        *rest,
        _INIT,
        *_TOKEN_IDS,
    )


# Weights

_LLAMA_MODULES: dict[str, Stored] = {
    "embed_tokens": "embed_tokens",
    "norm": "norm",
    "attn_norm": "input_layernorm",
    "attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": "mlp.down_proj",
}
_LLAMA_WEIGHTS = WeightNames(prefix="model.", layers="model.layers.{}.", modules=_LLAMA_MODULES)
_POST_NORM_WEIGHTS = dataclasses.replace(
    _LLAMA_WEIGHTS,
    modules=_LLAMA_MODULES
    | {
        "post_attn_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        language_model="LlamaForCausalLM",
        classifier="LlamaForSequenceClassification",
        entries=_llama_like(OneRope(), _ATTENTION_BIAS, Value("mlp_bias", "mlp_bias", bool, False)),
        weights=_LLAMA_WEIGHTS,
    ),
    "mistral": Family(
        language_model="MistralForCausalLM",
        classifier="MistralForSequenceClassification",
        entries=_llama_like(
            OneRope(), Windows(has_types=False), kv_heads=8, max_positions=4096 * 32
        ),
        weights=_LLAMA_WEIGHTS,
    ),
    "qwen2": Family(
        language_model="Qwen2ForCausalLM",
        classifier="Qwen2ForSequenceClassification",
        entries=_llama_like(
            OneRope(),
            Constant({"qkv_bias": True}),
            _QWEN_WINDOWS,
            kv_heads=32,
            max_positions=32_768,
        ),
        weights=_LLAMA_WEIGHTS,
    ),
    "qwen3": Family(
        language_model="Qwen3ForCausalLM",
        classifier="Qwen3ForSequenceClassification",
        entries=_llama_like(
            OneRope(),
            Constant({"qk_norm": True}),
            _ATTENTION_BIAS,
            _QWEN_WINDOWS,
            head_dim=128,
            kv_heads=32,
            max_positions=32_768,
        ),
        weights=_LLAMA_WEIGHTS,
    ),
    "gemma": Family(
        language_model="GemmaForCausalLM",
        classifier="GemmaForSequenceClassification",
        entries=_gemma_like(
            OneRope(),
            kv_heads=16,
            max_positions=8192,
            # Gemma's "gelu" always meant the tanh form.
            activation=Choice(
                "hidden_act", _TANH | {"gelu": {"activation": "gelu_tanh"}}, "gelu_pytorch_tanh"
            ),
        ),
        weights=_LLAMA_WEIGHTS,
    ),
    "gemma2": Family(
        language_model="Gemma2ForCausalLM",
        classifier="Gemma2ForSequenceClassification",
        entries=_gemma_like(
            OneRope(),
            Constant({"post_norms": True}),
            AttentionScale(),
            Windows(layers=lambda raw, layer: layer % 2 == 0),
            _softcap("attn_logit_softcapping", "attention_softcap", 50.0),
            _softcap("final_logit_softcapping", "final_softcap", 30.0),
            kv_heads=4,
            max_positions=8192,
            activation=_GEMMA2_ACTIVATION,
        ),
        weights=_POST_NORM_WEIGHTS,
    ),
    "gemma3_text": Family(
        language_model="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
        entries=_gemma_like(
            TwoRopes(),
            Constant({"post_norms": True, "qk_norm": True}),
            AttentionScale(),
            Windows(layers=_has_pattern_window),
            # A key that transformers' module reads and does not use.
            Choice("attn_logit_softcapping", {None: {"attention_softcap": None}}, None),
            _softcap("final_logit_softcapping", "final_softcap", None),
            kv_heads=4,
            max_positions=131_072,
            activation=_GEMMA2_ACTIVATION,
        ),
        weights=_POST_NORM_WEIGHTS,
    ),
    "gpt2": Family(
        language_model="GPT2LMHeadModel",
        classifier="GPT2ForSequenceClassification",
        entries=_gpt_like(
            Constant({"rope": None, "qkv_bias": True, "output_bias": True}),
            Choice(
                "scale_attn_weights",
                {True: {"attention_scale": None}, False: {"attention_scale": 1.0}},
                True,
            ),
            Choice("scale_attn_by_inverse_layer_idx", {False: {}}, False),
            Choice("add_cross_attention", {False: {}}, False),
            tied=True,
        ),
        weights=WeightNames(
            prefix="transformer.",
            layers="transformer.h.{}.",
            modules={
                "embed_tokens": "wte",
                "embed_positions": "wpe",
                "norm": "ln_f",
                "attn_norm": "ln_1",
                "attn.qkv_proj": Transposed("attn.c_attn"),
                "attn.o_proj": Transposed("attn.c_proj"),
                "mlp_norm": "ln_2",
                "mlp.up_proj": Transposed("mlp.c_fc"),
                "mlp.down_proj": Transposed("mlp.c_proj"),
            },
        ),
    ),
    "gpt_neox": Family(
        language_model="GPTNeoXForCausalLM",
        classifier="GPTNeoXForSequenceClassification",
        entries=(
            Value("vocab_size", "vocab_size", int),
            Value("hidden_size", "hidden_size", int),
            Value("intermediate_size", "intermediate_size", int),
            Value("num_hidden_layers", "num_layers", int),
            Value("num_attention_heads", "num_heads", int),
            Value("max_position_embeddings", "max_positions", int, 2048),
            Value("layer_norm_eps", "norm_eps", float, 1e-5),
            Value("tie_word_embeddings", "tie_embeddings", bool, False),
            Value("use_parallel_residual", "parallel_residual", bool, True),
            Value("attention_bias", ("qkv_bias", "output_bias"), bool, True),
            Constant({"num_kv_heads": _num_heads, "head_dim": _ungrouped_head_dim}),
            Constant({"norm": "layer", "gated_mlp": False, "mlp_bias": True}),
            Choice("hidden_act", _ERF | _TANH | _RELU | _SILU, "gelu"),
            OneRope(
                theta_key="rotary_emb_base",
                fraction_key="rotary_pct",
                default_fraction=0.25,
                is_partial=True,
            ),
            _INIT,
            *_TOKEN_IDS,
        ),
        weights=WeightNames(
            prefix="gpt_neox.",
            layers="gpt_neox.layers.{}.",
            modules={
                "embed_tokens": "embed_in",
                "norm": "final_layer_norm",
                "attn_norm": "input_layernorm",
                "attn.qkv_proj": PerHead("attention.query_key_value"),
                "attn.o_proj": "attention.dense",
                "mlp_norm": "post_attention_layernorm",
                "mlp.up_proj": "mlp.dense_h_to_4h",
                "mlp.down_proj": "mlp.dense_4h_to_h",
            },
            head="embed_out",
        ),
    ),
    "gptj": Family(
        language_model="GPTJForCausalLM",
        classifier="GPTJForSequenceClassification",
        entries=_gpt_like(
            LeadingPairs(),
            Constant({"parallel_residual": True, "shared_norm": True, "head_bias": True}),
            tied=False,
        ),
        weights=WeightNames(
            prefix="transformer.",
            layers="transformer.h.{}.",
            modules={
                "embed_tokens": "wte",
                "norm": "ln_f",
                "attn_norm": "ln_1",
                "attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
                "attn.o_proj": "attn.out_proj",
                "mlp.up_proj": "mlp.fc_in",
                "mlp.down_proj": "mlp.fc_out",
            },
        ),
    ),
}

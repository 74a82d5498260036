"""One tiny random model of transformers for every family and switch the decoder has.

Weights are wide enough (std 0.3, norms 0.5 to 1.5) that every part moves the logits. Windows and
trained lengths are shorter than `LENGTH`, the length a test's sequences should have.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

VOCAB_SIZE = 97
LENGTH = 40  # past every window (5 tokens) and every original_max_position_embeddings (16)

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": 64,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_NEOX_SIZES = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"} | {
    "num_attention_heads": 2,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "original_max_position_embeddings": 16,
}
_GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
}

# name: (model_type, what the configuration sets beside the sizes)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_SIZES, "tie_word_embeddings": True}),
    "llama-biases": (
        "llama",
        {
            **_SIZES,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 10,
            "eos_token_id": [2, 5],
        },
    ),
    "llama-linear": (
        "llama",
        {**_SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}},
    ),
    "llama-llama3": ("llama", {**_SIZES, "rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {**_SIZES, "rope_parameters": _YARN}),
    "mistral": ("mistral", {**_SIZES, "sliding_window": 5, "head_dim": 8}),
    "qwen2": ("qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {**_SIZES, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {**_SIZES, "head_dim": 8, "attention_bias": True}),
    "gemma": ("gemma", {**_SIZES, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            **_SIZES,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_SIZES,
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "rope_parameters": _GEMMA3_ROPES,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt2": ("gpt2", {**_GPT_SIZES}),
    "gpt2-untied": ("gpt2", {**_GPT_SIZES, "n_inner": 30, "tie_word_embeddings": False}),
    "gpt_neox": (
        "gpt_neox",
        {**_NEOX_SIZES, "rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.5}},
    ),
    "gpt_neox-sequential": (
        "gpt_neox",
        {
            **_NEOX_SIZES,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    ),
    "gptj": ("gptj", {**_GPT_SIZES, "rotary_dim": 4}),
    "gptj-tied": ("gptj", {**_GPT_SIZES, "rotary_dim": 12, "tie_word_embeddings": True}),
}


def build(name: str, **changes: Any) -> Any:
    """A model of FAMILY_MODELS with other settings of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = _MODELS[name]
    config = AutoConfig.for_model(model_type, **(settings | changes))
    # eager: the one implementation that knows every switch (soft caps).
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(sum(name.encode()))
    offset = 1.0 if model_type.startswith("gemma") else 0.0  # Gemma stores norms less one
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and key.endswith("weight"):
                parameter.uniform_(0.5 - offset, 1.5 - offset, generator=generator)
            else:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


FAMILY_MODELS: dict[str, Callable[[], Any]] = {name: partial(build, name) for name in _MODELS}
"""Each call gives a fresh PreTrainedModel (for causal language modelling) with the same weights."""

"""Tiny random models of transformers that fuserl's own decoder lacks, for tests of the fallback.

Weights are wide, as in tiny_models.py, and windows and trained lengths are shorter than LENGTH.
"""

from typing import Any

import torch

VOCAB_SIZE = 61
LENGTH = 24

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 14,
}

# name: (model_type, its configuration)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("olmo2", {**_SIZES}),
    "llama-dynamic": (  # a family of ours with a switch that it lacks
        "llama",
        {**_SIZES, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 2.0}},
    ),
    "phi3-longrope": (
        "phi3",
        {**_SIZES, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 14},
    ),
    "falcon-alibi": ("falcon", {**_SIZES, "alibi": True, "parallel_attn": False}),
    "bloom": (
        "bloom",
        {**_SIZES, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2},
    ),
    "opt": ("opt", {**_SIZES, "ffn_dim": 40, "word_embed_proj_dim": 16}),
    "mixtral-window": (
        "mixtral",
        {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    ),
    "cohere-scale": ("cohere", {**_SIZES, "logit_scale": 0.25}),
    "granite-scale": ("granite", {**_SIZES, "logits_scaling": 3.0}),
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
    "biogpt": ("biogpt", {**_SIZES, "tie_word_embeddings": False}),  # its head: output_projection
}
OTHER_NAMES = tuple(_MODELS)


def build(name: str, **changes: Any) -> Any:
    """A fresh PreTrainedModel for causal language modelling, the same weights each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = _MODELS[name]
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1 and key.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "A_log" not in key:
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()

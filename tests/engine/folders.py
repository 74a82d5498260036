"""Small models and their folders, for the tests of what is in a folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fuserl.model.config import DecoderConfig
from fuserl.model.config_json import config_to_hf
from fuserl.model.heads import HeadKind, LanguageModel, ScalarModel

TIED = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
)
UNTIED = dataclasses.replace(
    TIED, tie_embeddings=False, qkv_bias=True, output_bias=True, head_dim=12, pad_token_id=0
)
BIASED_HEAD = dataclasses.replace(
    TIED,
    family="gptj",
    num_kv_heads=2,
    rope=dataclasses.replace(TIED.rope, dim=4, interleaved=True),
    norm="layer",
    gated_mlp=False,
    mlp_bias=True,
    activation="gelu_tanh",
    parallel_residual=True,
    shared_norm=True,
    tie_embeddings=False,
    head_bias=True,
)


def language_model(config: DecoderConfig, seed: int = 0) -> LanguageModel:
    model = LanguageModel(dataclasses.replace(config, init_std=0.3))
    model.initialize(seed)
    if model.lm_head_bias is not None:
        torch.nn.init.normal_(model.lm_head_bias)
    return model


def reward_model(
    config: DecoderConfig, bias: float = 0.25, head: HeadKind = "linear"
) -> ScalarModel:
    model = ScalarModel(dataclasses.replace(config, init_std=0.3), head)
    model.trunk.initialize(torch.Generator().manual_seed(0))
    model.initialize_head(1)
    with torch.no_grad():
        model.score.bias.fill_(bias)
    return model


def assert_same_bits(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def transformers_llama(config: DecoderConfig) -> Any:
    """A model of transformers with that configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**config_to_hf(config)))


def load_in_transformers(auto_class: Any, folder: Path) -> Any:
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model

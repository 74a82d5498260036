"""Random decoders of every kind that the native loop runs, and rollouts of them, for tests."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from fuserl.model.config import DecoderConfig, Rope, RopeScaling
from fuserl.model.heads import LanguageModel
from fuserl.rollout import native_runner
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.native_runner import NativeRunner
from fuserl.rollout.sampling import SamplingParams
from fuserl_kernels import native

VOCAB_SIZE = 61
GROUPED = DecoderConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=1024,
    tie_embeddings=False,
    eos_token_id=2,
)
CONFIGS = {
    "llama_grouped": GROUPED,
    "multi_head_tied": dataclasses.replace(GROUPED, num_kv_heads=4, tie_embeddings=True),
    "qwen": dataclasses.replace(
        GROUPED, qkv_bias=True, qk_norm=True, head_dim=12, rope=Rope(theta=1e6)
    ),
    "window": dataclasses.replace(
        GROUPED,
        window=5,
        num_kv_heads=1,
        rope=Rope(scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=16)),
    ),
    "gemma2": dataclasses.replace(
        GROUPED,
        tie_embeddings=True,
        window=7,
        window_layers=(True, False, True),
        local_rope=Rope(theta=100.0),
        norm_weight_offset=1.0,
        post_norms=True,
        attention_softcap=5.0,
        final_softcap=3.0,
        attention_scale=0.5,
        embedding_scale=32**0.5,
        activation="gelu_tanh",
    ),
    "layer_norm_biases": dataclasses.replace(
        GROUPED,
        norm="layer",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        activation="gelu",
        rope=Rope(dim=6, interleaved=True),
    ),
}
"""By name: each has a native loop."""

SAMPLINGS = {
    "plain": SamplingParams(temperature=1.0, seed=4),
    "cool": SamplingParams(temperature=0.7, seed=5),
    "greedy": SamplingParams(temperature=0.0),
    "top_k": SamplingParams(temperature=1.3, top_k=5, seed=6),
    "top_p": SamplingParams(top_p=0.8, seed=7),
    "min_p": SamplingParams(min_p=0.05, top_k=30, top_p=0.95, seed=8),
}


@torch.no_grad()
def scramble(model: nn.Module) -> Any:
    """Weights of ordinary size everywhere, biases and norms included, so that every parameter
    shows in the output."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(std=0.3, generator=generator)
    return model


def scrambled(name: str = "llama_grouped", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model of CONFIGS whose tokens vary."""
    return scramble(LanguageModel(CONFIGS[name])).to(dtype)


def ragged_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


def frequent_token(model: LanguageModel, prompts: Sequence[Sequence[int]], **options: Any) -> int:
    """An id that ends some completions early and others not: a good EOS."""
    free = decode(model, prompts, **options)
    rows = [row[:n] for row, n in zip(free.token_ids, free.lengths.tolist(), strict=True)]
    counts = {token: sum(token in row[1:] for row in rows) for row in rows for token in row}
    return int(min(counts, key=lambda token: abs(counts[token] - len(rows) / 2)))


def choose_runner(name: str, patch: pytest.MonkeyPatch) -> Any:
    """Have rollouts run in the native loop or through the decoder's modules: "native", "modules".
    Returns that class."""
    if name == "modules":
        patch.setattr(native_runner, "why_not", lambda model: "the modules are asked for")
        return ModuleRunner
    if native.why_absent() is not None:
        pytest.skip("native kernels are not built")
    return NativeRunner


def assert_same(ours: Completions, theirs: Completions, rows: Sequence[int] | None = None) -> None:
    """Row i of `ours` is row rows[i] of `theirs`, bit for bit where the kernels are compiled."""
    which = list(range(len(ours.lengths))) if rows is None else list(rows)
    assert torch.equal(ours.lengths, theirs.lengths[which])
    assert torch.equal(ours.has_eos, theirs.has_eos[which])
    width = ours.token_ids.shape[1]
    assert torch.equal(ours.token_ids, theirs.token_ids[which, :width])
    pairs = [
        (getattr(ours, name), getattr(theirs, name)[which, :width])
        for name in ("logprobs", "truncated_logprobs")
    ]
    assert (ours.trunk_states is None) == (theirs.trunk_states is None)
    if ours.trunk_states is not None and theirs.trunk_states is not None:
        assert rows is None, "streams of some rows stand elsewhere"
        pairs.append((ours.trunk_states, theirs.trunk_states))
    for mine, other in pairs:
        if native.why_absent() is None:
            assert torch.equal(mine, other)
        else:
            near = 1e-5 * float(other.abs().max())
            torch.testing.assert_close(mine, other, rtol=0, atol=near)

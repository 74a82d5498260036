"""Attention in the order of decoding: right, with torch's gradients, and such that what was sampled
is scored with the same bits."""

import dataclasses
from typing import Any

import pytest
import torch
from random_models import (
    CONFIGS,
    GROUPED,
    SAMPLINGS,
    ragged_prompts,
    scramble,
    scrambled,
)
from torch import Tensor

import fuserl_kernels as fk
from fuserl.model.attention import packed_attention
from fuserl.model.config import DecoderConfig, Rope
from fuserl.model.fixed_attention import fixed_attention
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import Packing
from fuserl.rollout.decode import Completions, decode
from fuserl.sequences import Sequences, completion_logprobs
from fuserl_kernels import native

needs_native = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)
LENGTHS, PROMPT_LENGTHS = [3, 290, 1, 270, 600], [2, 5, 1, 268, 300]  # splits are of 256 keys
OPTIONS: list[dict[str, Any]] = [{}, {"window": 7}, {"window": 270, "softcap": 4.0}]


def heads(lengths: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Query, key, value"""
    n = sum(lengths)
    return tuple(torch.randn(n, num, 8).to(dtype) for num in (4, 2, 2))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt_lengths", [None, PROMPT_LENGTHS, LENGTHS])
def test_equals_packed_attention_with_its_gradients(
    options: dict[str, Any], dtype: torch.dtype, prompt_lengths: list[int] | None
) -> None:
    """That is right by test_model_decoder.py."""
    packing = Packing.of(LENGTHS, prompt_lengths=prompt_lengths)
    inputs = [x.requires_grad_() for x in heads(LENGTHS, dtype)]
    gradient = torch.randn(sum(LENGTHS), 4, 8).to(dtype)
    ours = fixed_attention(*inputs, packing, scale=0.3, **options)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = packed_attention(*wide, packing, scale=0.3, **options)
    near = {"rtol": torch.finfo(dtype).eps, "atol": 2e-6}
    torch.testing.assert_close(ours.double(), truth, **near)
    theirs = packed_attention(*inputs, packing, scale=0.3, **options)
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, gradient),
        torch.autograd.grad(theirs, inputs, gradient),
        strict=True,
    ):
        assert torch.equal(mine, other)


@needs_native
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone(options: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = heads(LENGTHS, dtype)
    packing = Packing.of(LENGTHS, prompt_lengths=PROMPT_LENGTHS)
    whole = fixed_attention(*inputs, packing, scale=0.3, **options).split(LENGTHS)
    parts = zip(*(x.split(LENGTHS) for x in inputs), strict=True)
    for length, prompt, part, expected in zip(LENGTHS, PROMPT_LENGTHS, parts, whole, strict=True):
        alone = Packing.of([length], prompt_lengths=[prompt])
        assert torch.equal(fixed_attention(*part, alone, scale=0.3, **options), expected)


def rolled_out(model: LanguageModel, **changes: Any) -> tuple[list[list[int]], Completions]:
    """Prompts and completions from one token to more than a split of keys; slots are refilled."""
    prompts = ragged_prompts([300, 1, 258, 17, 5])
    out = decode(
        model,
        prompts,
        max_new_tokens=[40, 300, 270, 1, 9],
        sampling=SAMPLINGS["cool"],
        num_samples=2,
        num_slots=3,
        **changes,
    )
    return [prompt for prompt in prompts for _ in range(2)], out


def trainers(
    model: LanguageModel, prompts: list[list[int]], out: Completions, rows: list[int]
) -> tuple[Tensor, Tensor]:
    """The trainer's log-probabilities of these rows' tokens, and the rollout's."""
    lengths = out.lengths.tolist()
    sequences = Sequences.of(
        [prompts[row] for row in rows],
        [out.token_ids[row, : lengths[row]].tolist() for row in rows],
    )
    stored = torch.cat([out.logprobs[row, : lengths[row]] for row in rows])
    return completion_logprobs(model, sequences, SAMPLINGS["cool"].temperature), stored


OTHERS = {
    "gpt_neox": dataclasses.replace(
        GROUPED,
        parallel_residual=True,
        norm="layer",
        gated_mlp=False,
        activation="gelu",
        rope=Rope(dim=4),
        qkv_bias=True,
        mlp_bias=True,
    ),
}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), *OTHERS.values()], ids=[*CONFIGS, *OTHERS])
def test_what_was_sampled_is_scored_with_the_same_bits(
    config: DecoderConfig, dtype: torch.dtype
) -> None:
    model = scramble(LanguageModel(config)).to(dtype)
    prompts, out = rolled_out(model)
    model.trunk.exact = True
    for rows in (list(range(10)), [7, 2, 5], [3]):
        scored, stored = trainers(model, prompts, out, rows)
        assert scored.requires_grad
        assert torch.equal(scored, stored)
    with torch.no_grad():
        assert torch.equal(*trainers(model, prompts, out, [0, 9]))
    model.trunk.checkpointing = True
    assert torch.equal(*trainers(model, prompts, out, [0, 9]))


@needs_native
@pytest.mark.parametrize("name", ["llama_grouped", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_first_update_sees_a_ratio_of_one(name: str, dtype: torch.dtype) -> None:
    """Exactly: no pass over old log-probabilities would find others."""
    model = scrambled(name, dtype)
    prompts, out = rolled_out(model)
    model.trunk.exact = True
    lengths = out.lengths.tolist()
    sequences = Sequences.of(
        prompts, [row[:n] for row, n in zip(out.token_ids.tolist(), lengths, strict=True)]
    )
    stored = torch.cat([row[:n] for row, n in zip(out.logprobs, lengths, strict=True)])
    ones = torch.ones_like(stored)
    loss, metrics = fk.linear_policy_loss(
        sequences.hidden_states(model.trunk)[sequences.before],
        model.output_weight,
        sequences.completion_ids,
        stored,
        ones,
        ones.bool(),
        softcap=model.config.final_softcap,
        temperature=SAMPLINGS["cool"].temperature,
    )
    loss.backward()
    assert float(metrics["policy/approxkl"]) == 0
    assert float(metrics["val/ratio"]) == 1
    assert float(metrics["val/ratio_var"]) == 0
    assert loss.item() == -1
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@needs_native
def test_a_hydras_tops_score_with_the_same_bits() -> None:
    """From the stream that the rollout kept."""
    model = scrambled("gemma2")
    prompts, out = rolled_out(model, keep_before=2)
    assert out.trunk_states is not None
    assert out.trunk_starts is not None
    model.trunk.exact = True
    lengths = out.lengths.tolist()
    starts = out.trunk_starts.tolist()
    sequences = Sequences.of(
        prompts, [row[:n] for row, n in zip(out.token_ids.tolist(), lengths, strict=True)]
    )
    pieces = [
        out.trunk_states[start : start + length]
        for row in range(10)
        for start, length in zip(starts[row], (len(prompts[row]), lengths[row]), strict=True)
    ]
    sequences = dataclasses.replace(sequences, trunk_states=torch.cat(pieces))
    model.trunk.shared_layers = 2
    scored = completion_logprobs(model, sequences, SAMPLINGS["cool"].temperature)
    stored = torch.cat([row[:n] for row, n in zip(out.logprobs, lengths, strict=True)])
    assert torch.equal(scored, stored)


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_without_it_they_are_near(name: str) -> None:
    model = scrambled(name)
    assert not model.trunk.exact
    prompts, out = rolled_out(model)
    scored, stored = trainers(model, prompts, out, list(range(10)))
    torch.testing.assert_close(stored, scored, rtol=1e-5, atol=1e-5)


@needs_native
def test_gradients_are_near_those_of_torchs_attention() -> None:
    model = scrambled("qwen")
    prompts, out = rolled_out(model)
    found = []
    for exact in (True, False):
        model.trunk.exact = exact
        trainers(model, prompts, out, list(range(10)))[0].sum().backward()
        found.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    for mine, other in zip(*found, strict=True):
        assert mine is not None
        assert other is not None
        scale = float(other.abs().max())
        assert scale > 0
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * scale)

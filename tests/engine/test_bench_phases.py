"""Whole steps by phase on a tiny shape: what is counted, timed, told and left out."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fuserl_kernels as fk
from fuserl.batch import ShapedBatch
from fuserl.bench import rl_phases
from fuserl.bench.decode_steps import MODELS, floor_ms
from fuserl.bench.phase_costs import phase_costs, rollout_costs
from fuserl.bench.phases import PhaseClock, phase_results, phase_table
from fuserl.bench.rl_phases import PhasesCase, estimated_bytes, phase_cases, run_case
from fuserl.bench.timing import Ceilings
from fuserl.model.config import DecoderConfig
from fuserl.model.flops import (
    Lengths,
    Pass,
    attention_flops,
    decode_attention_flops,
    layers_flops,
    pass_of,
    prefill_flops,
    step_flops,
)
from fuserl.model.freezing import freeze_lowest
from fuserl.model.heads import LanguageModel, ScalarModel, SharedCritic
from fuserl.model.lora import add_lora, freeze_base
from fuserl.sequences import Sequences, completion_values
from fuserl.stages.rl_metrics import Clock

ROOT = Path(__file__).parents[2]
CPU = Ceilings(1e10, 1e11, "fp32")
SMALL: dict[str, Any] = {"prompt_length": 8, "max_new_tokens": 6, "microbatch_size": 2}
PPO = PhasesCase(
    model="tiny", algorithm="ppo", num_prompts=3, num_samples=1, dtype="fp32", device="cpu", **SMALL
)
GRPO = dataclasses.replace(PPO, algorithm="grpo", num_samples=2)
RAGGED = Lengths([4, 4, 7, 7], [3, 5, 1, 9], num_samples=2)


def counted(model: LanguageModel | ScalarModel, lengths: Lengths, backward: bool) -> int:
    """Flops of the products, as torch counts its own; attention it counts at the full square."""
    prompts = [[3] * length for length in lengths.prompts]
    sequences = Sequences.of(prompts, [[4] * length for length in lengths.completions])
    with fk.use_backend("reference"), FlopCounterMode(display=False) as counter:
        hidden = sequences.hidden_states(model.trunk)
        if isinstance(model, LanguageModel):
            found = model.logits(hidden[sequences.before]).logsumexp(-1)
        else:
            found = completion_values(model, sequences, max(lengths.completions), hidden)
        if backward:
            found.sum().backward()
    by_op = counter.get_flop_counts()["Global"]
    return sum(count for op, count in by_op.items() if str(op) in ("aten.mm", "aten.addmm"))


def attention(config: DecoderConfig, lengths: Lengths, depth: int = 0) -> int:
    return attention_flops(config, depth, config.num_layers, lengths.whole)


@pytest.mark.parametrize("kind", ["language model", "linear", "mlp"])
@pytest.mark.parametrize("name", ["tiny", "biased"])
def test_a_pass_is_counted_as_torch_counts_it(kind: str, name: str) -> None:
    config = MODELS["tiny"]
    if name == "biased":
        config = dataclasses.replace(
            config, tie_embeddings=False, qkv_bias=True, window=5, qk_norm=True
        )
    model = LanguageModel(config) if kind == "language model" else ScalarModel(config, kind)
    model.initialize(0)
    one, seen = pass_of(model), attention(config, RAGGED)
    forward = one.forward_flops(RAGGED) - seen
    assert forward == counted(model, RAGGED, backward=False)
    both = forward + one.backward_flops(RAGGED) - 2 * seen
    assert both == counted(model, RAGGED, backward=True)


def test_frozen_layers_and_adapters_cost_no_gradient_of_their_own() -> None:
    config = MODELS["tiny"]
    frozen = LanguageModel(config)
    freeze_lowest(frozen, 1)
    one, lengths = pass_of(frozen), RAGGED
    assert (one.depth, one.head_trains, one.weights_train) == (1, False, True)
    found = one.forward_flops(lengths) + one.backward_flops(lengths)
    found -= attention(config, lengths) + 2 * attention(config, lengths, depth=1)
    assert found == counted(frozen, lengths, backward=True)

    adapted = LanguageModel(config)
    freeze_base(adapted)
    add_lora(adapted, 2, 4.0, seed=0)
    one = pass_of(adapted)
    assert (one.depth, one.head_trains, one.weights_train) == (0, False, False)
    head = 2 * config.hidden_size * config.vocab_size * sum(lengths.completions)
    products = layers_flops(config, 0, config.num_layers, lengths.whole) - attention(
        config, lengths
    )
    assert one.backward_flops(lengths) == products + 2 * attention(config, lengths) + head


def test_each_pass_has_the_head_it_says() -> None:
    """A critic alone in scoring has no vocabulary head; two language models have two."""
    config, lengths = MODELS["tiny"], RAGGED
    policy = Pass(config=config, head="vocabulary")
    critic = Pass(config=config, head="linear")

    def scoring(*scored: Pass) -> int:
        return step_flops(lengths, scored=scored, updated=[policy], num_epochs=0).naive

    layers = layers_flops(config, 0, config.num_layers, lengths.whole)
    head = 2 * config.hidden_size * config.vocab_size * sum(lengths.completions)
    number = 2 * config.hidden_size * sum(lengths.whole)
    assert scoring() == 0
    assert scoring(critic) == layers + number
    assert scoring(policy, critic) == 2 * layers + head + number
    assert scoring(policy, policy, critic) == 3 * layers + 2 * head + number
    shared = dataclasses.replace(critic, has_layers=False)
    assert scoring(shared) == number


def test_a_rollout_is_its_prompts_and_every_token_but_the_last() -> None:
    """Summed token by token."""
    config, lengths = dataclasses.replace(MODELS["tiny"], window=6), RAGGED
    heads = 4 * config.num_layers * config.num_heads * config.head_dim
    seen = sum(
        min(prompt + token + 1, 6)
        for prompt, completion in zip(lengths.prompts, lengths.completions, strict=True)
        for token in range(completion - 1)
    )
    assert decode_attention_flops(config, lengths) == heads * seen
    assert prefill_flops(config, lengths) == layers_flops(config, 0, config.num_layers, [4, 7])
    prefill, products, attend = rollout_costs(
        Pass(config=config, head="vocabulary"), lengths, num_slots=64, weight_bytes=2
    )
    assert prefill.num_flops == prefill_flops(config, lengths)
    assert attend.num_flops == heads * seen
    own = sum(min(token + 1, 6) for c in lengths.completions for token in range(c - 1))
    of_prompts = sum(
        min(prompt + token + 1, 6) - min(token + 1, 6)
        for prompt, longest in ((4, 5), (7, 9))
        for token in range(longest - 1)
    )
    key_bytes = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    assert attend.num_bytes == key_bytes * (own + of_prompts)
    layers = products.num_flops - 2 * config.hidden_size * config.vocab_size * 18
    assert layers == layers_flops(config, 0, 2, [14]) - attention_flops(config, 0, 2, [14])


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen2.5-1.5B", "Llama-3-8B"])
def test_the_limit_of_a_rollout_is_that_of_its_decode_steps(name: str) -> None:
    """Of decode_steps.py, which reads a prompt for each row; norms and the last token's layers
    make the difference."""
    config, ceilings = MODELS[name], Ceilings(4.3e12, 790e12, "bf16")
    lengths = Lengths([512] * 64, [512] * 64)
    parts = rollout_costs(Pass(config=config, head="vocabulary"), lengths, 64, weight_bytes=2)
    with torch.device("meta"):
        model = LanguageModel(config)
    num_weights = sum(p.numel() for p in model.parameters())
    num_weights -= 0 if config.tie_embeddings else model.trunk.embed_tokens.weight.numel()
    expected = sum(floor_ms(config, num_weights, 64, 512 + i, ceilings) for i in range(512))
    assert sum(map(ceilings.floor_ms, parts[1:])) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("case", [PPO, GRPO], ids=["ppo", "grpo"])
def test_whole_steps_are_timed_by_phase(case: PhasesCase) -> None:
    report = run_case(case, CPU, 0)
    assert report.reason == ""
    assert report.num_slots == case.num_sequences
    assert report.first_step_seconds is not None
    assert report.first_step_seconds > 0
    content = json.loads(json.dumps(report.to_json()))
    assert [result["name"] for result in content["results"]] == [
        *("rollout", "score", "shape", "update", "step")
    ]
    for result in content["results"]:
        assert len(result["seconds"]) == rl_phases.MIN_STEPS
        low, high = result["quartiles_seconds"]
        assert 0 < low <= result["median_seconds"] <= high
        tokens = case.num_sequences * case.max_new_tokens
        assert result["tokens_per_second"] == pytest.approx(tokens / result["median_seconds"])
        assert 0 < result["share_of_limit"] < 1
        assert result["peak_bytes"] > 0
        if result["name"] != "shape":
            assert 0 < result["mfu"] < 1
        assert f"| {result['name']} |" in report.table()


def test_the_flops_are_those_of_the_models() -> None:
    config, lengths = MODELS["tiny"], PPO.lengths
    policy, value = (Pass(config=config, head=head) for head in ("vocabulary", "linear"))
    results = {result.name: result.num_flops for result in run_case(PPO, CPU, 0).results}
    assert results["score"] == policy.forward_flops(lengths) + 2 * value.forward_flops(lengths)
    assert results["update"] == sum(
        one.forward_flops(lengths) + one.backward_flops(lengths) for one in (policy, value)
    )
    assert results["shape"] == 0
    assert results["step"] == sum(results.values()) - results["step"]
    results = {result.name: result.num_flops for result in run_case(GRPO, CPU, 0).results}
    assert results["score"] == policy.forward_flops(GRPO.lengths)


def test_a_shared_critic_is_a_head_in_the_update() -> None:
    steps = rl_phases._Steps(PPO)
    whole = phase_costs(steps.learner, PPO.lengths, 3)
    shared = SharedCritic(steps.learner.policy)
    models = dataclasses.replace(steps.learner.models, critic=shared)
    less = phase_costs(dataclasses.replace(steps.learner, models=models), PPO.lengths, 3)
    assert whole is not None
    assert less is not None
    assert less["score"] == whole["score"], "there it runs whole"
    config, tokens = MODELS["tiny"], sum(PPO.lengths.whole)
    policy = pass_of(steps.learner.policy)
    own = policy.forward_flops(PPO.lengths) + policy.backward_flops(PPO.lengths)
    assert less["update"][0].num_flops == own + 3 * 2 * config.hidden_size * tokens
    assert less["update"][0].num_flops < whole["update"][0].num_flops


def test_a_model_of_others_is_timed_without_limits() -> None:
    class Other(torch.nn.Module):
        dtype = torch.float32

    found = phase_results([{"rollout": 0.5, "score": 1.0}] * 2, None, 30, {}, CPU)
    assert [(one.name, one.tokens_per_second) for one in found] == [
        *(("rollout", 60), ("score", 30), ("step", 20))
    ]
    assert {(one.num_flops, one.share_of_limit, one.mfu(CPU)) for one in found} == {(None,) * 3}
    assert "| score | 1000 [1000, 1000] | 30 | - | - | - | - | - |" in phase_table(found, CPU)
    steps = rl_phases._Steps(GRPO)
    policy = LanguageModel(MODELS["tiny"])
    policy.trunk = Other()  # type: ignore[assignment]
    assert phase_costs(dataclasses.replace(steps.learner, policy=policy), GRPO.lengths, 6) is None


def test_what_does_not_fit_says_where_and_what_was_timed_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learn, calls = rl_phases.learn, []

    def failing(learner: Any, shaped: ShapedBatch, *, step: int, clock: Clock) -> Any:
        calls.append(step)
        if step == 2:
            with clock.lap("update"):
                raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(learner, shaped, step=step, clock=clock)

    monkeypatch.setattr(rl_phases, "learn", failing)
    report = run_case(GRPO, CPU, 0)
    assert calls == [0, 1, 2]
    assert report.reason == "out of memory in update, after 1 timed steps"
    assert {len(result.seconds) for result in report.results} == {1}
    assert report.reason in report.table()

    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rl_phases, "_on_device", no_room)
    report = run_case(GRPO, CPU, 0)
    assert report.reason == "out of memory before the first step, after 0 timed steps"
    assert report.results == []
    json.dumps(report.to_json())

    def broken(*_: Any) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(rl_phases, "_on_device", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_case(GRPO, CPU, 0)


def test_a_clock_keeps_what_ran_when_an_error_came_up() -> None:
    clock = PhaseClock("cpu")
    with clock.lap("score"):
        assert clock.phase == "score"
        held = torch.ones(4 << 20)
    with pytest.raises(KeyError), clock.lap("update"):
        raise KeyError
    assert (clock.phase, list(clock.seconds)) == ("update", ["score"])
    assert clock.peak_bytes["score"] > held.nbytes


def test_the_cases_fit_their_card() -> None:
    cases = phase_cases()
    assert len({case.title for case in cases}) == len(cases)
    assert {(case.model, case.algorithm) for case in cases} == {
        (model, algorithm)
        for model in ("Qwen3-0.6B", "Qwen2.5-1.5B")
        for algorithm in ("ppo", "grpo")
    }
    for case in cases:
        assert case.num_sequences == 256
        assert estimated_bytes(case) < 76e9
    large = dataclasses.replace(
        cases[0], model="Llama-3-8B", microbatch_size=1, activation_checkpointing=True
    )
    assert estimated_bytes(large) > 145e9


def test_the_estimate_counts_what_is_there() -> None:
    """Weights and moments, against a step on the CPU."""
    steps = rl_phases._Steps(PPO)
    steps.take(Clock())
    learner = steps.learner
    models = [learner.policy, learner.models.critic]
    assert all(model is not None for model in models)
    weights = sum(p.nbytes for model in models for p in model.parameters())  # type: ignore[union-attr]
    state = weights + sum(t.nbytes for t in learner.optimizer.state().values())
    gradients = weights
    frozen = sum(p.nbytes for p in learner.models.reference.parameters())  # type: ignore[union-attr]
    held = state + gradients + 2 * frozen
    matrices = 2 * rl_phases.num_parameters(MODELS["tiny"]) * (16 + 4)
    assert matrices == pytest.approx(held, rel=0.03), "all but norms and scalar heads"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "Qwen9"}, "model must be one of"),
        ({"dtype": "fp16"}, "dtype must be bf16 or fp32, got 'fp16'"),
    ],
)
def test_cases_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PPO, **options)


def test_it_needs_no_command_line_and_no_rouge() -> None:
    """As on a machine where they are not installed."""
    code = """
import sys
for name in ("tyro", "rouge_score", "trl", "liger_kernel", "flash_attn"):
    sys.modules[name] = None
from fuserl.bench.rl_phases import PhasesCase, run_case
from fuserl.bench.timing import Ceilings
sizes = {"num_prompts": 2, "num_samples": 2, "prompt_length": 4, "max_new_tokens": 3}
case = PhasesCase(model="tiny", algorithm="grpo", dtype="fp32", device="cpu", **sizes)
print(len(run_case(case, Ceilings(1e10, 1e11, "fp32"), 0).results))
"""
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5"]


@pytest.mark.gpu
@pytest.mark.covers("rollout")
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_gpu_tells_captures_and_peaks(algorithm: str) -> None:
    case = dataclasses.replace(GRPO, algorithm=algorithm, dtype="bf16", device="cuda")
    report = run_case(case, Ceilings(1e12, 1e14, "bf16", 1e-3), 0)
    assert report.reason == ""
    assert report.capture_seconds is not None
    assert report.first_step_seconds is not None
    assert 0 < report.capture_seconds < report.first_step_seconds
    for result in report.results:
        assert len(result.seconds) == rl_phases.MIN_STEPS
        assert result.peak_bytes is not None
        assert result.peak_bytes > 0

"""The benchmark's problems of ops on [B, T] and of sampling: truths, costs, what is told apart."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from fuserl.bench import sampling, token_problems, token_rivals
from fuserl.bench.case import Case, Cost
from fuserl.bench.checking import Call, bound_for
from fuserl.bench.op import BASELINE
from fuserl.bench.ops import OPS, providers
from fuserl.bench.problem import CLIP_RANGE
from fuserl.bench.rivals import Unavailable
from fuserl.bench.run import check
from fuserl.bench.timing import Replay, wall_ms
from fuserl.bench.truth import SamplerTruth
from fuserl_kernels import native

BOUND = bound_for("fp32", False, None)
ON_TOKENS = [op for op in OPS if OPS[op].defaults["cpu"].num_slots]


def tokens(op: str, num_sequences: int = 6, num_slots: int = 40, **options: object) -> Case:
    return Case(
        op=op,
        pass_name=OPS[op].passes[-1],
        device="cpu",
        dtype="fp32",
        num_sequences=num_sequences,
        num_slots=num_slots,
        **options,  # type: ignore[arg-type]
    )


def samples(temperature: float = 0.8, top_p: float = 0.9, num_rows: int = 64) -> Case:
    return Case(
        op="sample_tokens",
        pass_name="forward",
        device="cpu",
        dtype="fp32",
        num_rows=num_rows,
        vocab_size=1200,
        temperature=temperature,
        top_p=top_p,
    )


# --- [B, T]


def test_lengths_run_evenly_from_half_to_all() -> None:
    assert tokens("gae", 5, 9).lengths == [9, 8, 7, 6, 5]
    assert tokens("gae", 1, 9).lengths == [9]
    assert tokens("gae", 3, 1).lengths == [1, 1, 1]
    mask = token_problems.gae_problem(tokens("gae", 5, 9)).inputs[-1]
    assert sorted(mask.sum(1).tolist()) == [5, 6, 7, 8, 9]
    assert mask[:, 0].all()
    assert (mask.int().diff(dim=1) <= 0).all(), "padding on the right only"


@pytest.mark.parametrize("op", ["masked_whiten", "rewards_to_advantages"])
def test_a_single_token_is_whitened_to_its_mean(op: str) -> None:
    problem = OPS[op].problem(tokens(op, 1, 1))
    (provider,) = (p for p in providers(op) if p.backend == "reference")
    result, _ = check(problem, provider, None)
    assert result.status == "timed", result.reason
    assert problem.truth.outputs[0].item() == 0.0  # type: ignore[union-attr]


def test_the_exact_advantages_are_those_of_a_plain_loop() -> None:
    num_slots = 2 * token_problems._ROW_BLOCK + 3
    problem = token_problems.gae_problem(tokens("gae", 3, num_slots))
    rewards, values, mask = problem.inputs
    for row in range(3):
        advantage = following = 0.0
        for t in reversed(range(int(mask[row].sum()))):
            reward, value = float(rewards[row, t]), float(values[row, t])
            delta = reward + token_problems.GAMMA * following - value
            advantage = delta + token_problems.GAMMA * token_problems.GAE_LAMBDA * advantage
            following = value
            exact = [float(x[row, t]) for x in problem.truth.outputs]  # type: ignore[union-attr]
            assert exact == pytest.approx([advantage, advantage + value], abs=1e-12)


@pytest.mark.parametrize("op", [op for op in ON_TOKENS if op != "kl_penalty"])
def test_an_answer_that_uses_the_padding_is_wrong(op: str) -> None:
    problem = OPS[op].problem(tokens(op))
    mask = problem.inputs[-1]
    assert mask.dtype == torch.bool
    unmasked = dataclasses.replace(problem, inputs=(*problem.inputs[:-1], torch.ones_like(mask)))
    eager = OPS[op].rivals[BASELINE](problem.case)
    outputs, gradients = Call(unmasked, eager, None).run()
    assert problem.truth.value_error(outputs) > BOUND.value
    if gradients:
        assert problem.truth.gradient_error(gradients) > BOUND.gradient


@pytest.mark.parametrize("op", ["gae", "rewards_to_advantages"])
@pytest.mark.parametrize("num_slots", [1, 2, 33])
def test_the_scan_is_the_loop(op: str, num_slots: int) -> None:
    problem = OPS[op].problem(tokens(op, 4, num_slots))
    for name in ("torch", "torch-scan"):
        outputs, _ = Call(problem, OPS[op].rivals[name](problem.case), None).run()
        assert problem.truth.value_error(outputs) < 2e-6, name


def test_ratios_and_values_keep_off_the_clip_on_both_sides() -> None:
    problem = token_problems.ppo_problem(tokens("ppo_loss", 32, 64))
    new_logprobs, new_values, logprobs, _, values, returns, _ = problem.inputs
    for new, old in ((new_logprobs, logprobs), (new_values, values)):
        distance = (new - old).detach().abs()
        assert 0.1 < (distance > CLIP_RANGE).float().mean() < 0.6
        assert (distance - CLIP_RANGE).abs().min() > 0.1
    for edge in (1 - CLIP_RANGE, 1 + CLIP_RANGE):
        distance = (new_logprobs - logprobs - math.log(edge)).detach().abs()
        assert distance.min() > 0.05
    bounded = new_values.clamp(values - CLIP_RANGE, values + CLIP_RANGE)
    assert ((new_values - returns).sign() == (bounded - returns).sign()).all()


def test_what_must_move_is_counted_by_hand() -> None:
    case = dataclasses.replace(tokens("gae", 2, 4), pass_name="forward")  # 6 of 8 slots trained
    both = dataclasses.replace(case, pass_name="forward_backward")
    assert token_problems.gae_cost(case) == Cost(8 + 2 * 6 * 4 + 2 * 8 * 4, 0)
    assert token_problems.advantages_cost(case) == Cost(8 + 2 * 4 + 3 * 6 * 4 + 4 * 8 * 4, 0)
    assert token_problems.whiten_cost(case) == Cost(8 + 6 * 4 + 8 * 4, 0)
    assert token_problems.kl_cost(case) == Cost(3 * 8 * 4, 0)
    assert token_problems.kl_cost(both) == Cost((3 + 5) * 8 * 4, 0)
    assert token_problems.policy_loss_cost(both) == Cost(8 + 3 * 6 * 4 + 8 * 4, 0)
    assert token_problems.ppo_cost(case) == Cost(8 + 6 * 6 * 4, 0)
    assert token_problems.ppo_cost(both) == Cost(8 + 6 * 6 * 4 + 2 * 8 * 4, 0)
    half = dataclasses.replace(both, dtype="bf16")
    assert token_problems.ppo_cost(half) == Cost(8 + 6 * 6 * 2 + 2 * 8 * 2, 0)
    pairs = dataclasses.replace(both, num_sequences=0, num_slots=0, num_rows=5)
    assert token_problems.pairwise_cost(pairs) == Cost(4 * 5 * 4, 0)


def test_metrics_are_outputs_only_when_asked_for() -> None:
    for op, num_metrics in (("policy_loss", 3), ("ppo_loss", 4)):
        for with_metrics in (False, True):
            problem = OPS[op].problem(tokens(op, with_metrics=with_metrics))
            outputs, _ = Call(problem, OPS[op].ours(problem.case), "reference").run()
            assert len(outputs) == 1 + num_metrics * with_metrics
            assert problem.truth.value_error(outputs) < 1e-6


def test_half_precision_rivals_compute_in_float32() -> None:
    for op in ON_TOKENS:
        problem = OPS[op].problem(dataclasses.replace(tokens(op), dtype="bf16"))
        outputs, gradients = Call(problem, OPS[op].rivals[BASELINE](problem.case), None).run()
        assert problem.truth.value_error(outputs) < 1e-5, op
        assert problem.truth.gradient_error(gradients) < 5e-3, op


def test_compiled_takes_the_same_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stands_in(function: Callable, *, dynamic: bool) -> Callable:
        asked.append(dynamic)
        return function

    monkeypatch.setattr(torch, "compile", stands_in)
    make = token_rivals.compiled(token_rivals.gae_scan)
    problem = token_problems.gae_problem(tokens("gae"))
    outputs, _ = Call(problem, make(problem.case), None).run()
    assert asked == [False]
    assert problem.truth.value_error(outputs) < 2e-6


# --- sampling


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_every_sampler_is_right(temperature: float, top_p: float) -> None:
    problem = sampling.sampling_problem(samples(temperature, top_p))
    torch.manual_seed(0)
    for provider in providers("sample_tokens"):
        result, _ = check(problem, provider, None)
        if result.status != "unavailable":
            assert result.status == "timed", (provider.name, result.reason)
            assert result.error is not None
            assert result.error.value < 1e-5, provider.name


def test_the_yardstick_needs_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"reference": lambda *_: ()}
    monkeypatch.setattr(sampling, "tables", lambda: {"token_logprobs": table})
    with pytest.raises(Unavailable, match="only the reference"):
        sampling.exp_sum(samples())


@pytest.fixture
def drawn() -> tuple[SamplerTruth, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The truth, and tokens with their exact logprobs before and after truncation."""
    problem = sampling.sampling_problem(samples())
    truth, token_ids = problem.truth, problem.inputs[1]
    assert isinstance(truth, SamplerTruth)
    logprobs = truth.logits.log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)
    return truth, token_ids, logprobs, logprobs - truth.kept_mass.log()


def test_the_set_of_the_truth_is_the_nucleus(
    drawn: tuple[SamplerTruth, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    truth = drawn[0]
    for row, mass, edge in zip(truth.logits, truth.kept_mass, truth.edge, strict=True):
        kept = []
        for p in sorted(row.softmax(-1).tolist(), reverse=True):
            if sum(kept) >= truth.top_p:
                break
            kept.append(p)
        assert sum(kept) == pytest.approx(float(mass), abs=1e-12)
        assert kept[-1] == pytest.approx(float(edge), rel=1e-9)


def test_what_a_sampler_gets_wrong_is_seen(
    drawn: tuple[SamplerTruth, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    truth, token_ids, logprobs, truncated = drawn
    assert truth.value_error((token_ids, logprobs)) < 1e-12
    assert truth.value_error((token_ids, logprobs, truncated)) < 1e-12
    shifted = logprobs.clone()
    shifted[3] += 0.25
    assert truth.value_error((token_ids, shifted)) == pytest.approx(0.25)
    slack = float((truth.edge / truth.kept_mass).max())
    wrong = truth.value_error((token_ids, logprobs, truncated + 0.25))
    assert wrong == pytest.approx(0.25, abs=slack)
    assert truth.value_error((token_ids, logprobs * torch.nan)) == math.inf

    def with_token(token: int) -> float:
        changed = token_ids.clone()
        changed[0] = token
        exact = truth.logits.log_softmax(-1).gather(-1, changed[:, None].clamp(0, 1199))
        return truth.value_error((changed, exact.squeeze(-1)))

    assert with_token(-1) == math.inf
    assert with_token(1200) == math.inf
    assert with_token(sampling.BANNED_EVERY // 2) == math.inf, "it has probability 0"
    order = truth.logits[0].argsort(descending=True)
    assert with_token(int(order[0])) < 1e-12
    assert with_token(int(order[1000])) == pytest.approx(0.1, abs=0.01), "far beyond the nucleus"


def test_an_unfair_draw_is_seen(
    drawn: tuple[SamplerTruth, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    truth = drawn[0]
    greedy = truth.logits.argmax(-1)
    exact = truth.logits.log_softmax(-1).amax(-1)
    assert truth.value_error((greedy, exact)) == math.inf


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.covers("gae", "ppo_loss")
def test_a_replay_gives_the_answer_of_the_call() -> None:
    for op in ("gae", "ppo_loss"):
        problem = OPS[op].problem(dataclasses.replace(tokens(op), device="cuda", cuda_graph=True))
        call = Call(problem, OPS[op].rivals[BASELINE](problem.case), None)
        outputs, gradients = Replay(call).run()
        assert problem.truth.value_error(outputs) < 1e-5
        assert problem.truth.gradient_error(gradients) < 1e-5
        assert wall_ms(call, 1.0) > 0


@pytest.mark.gpu
@pytest.mark.covers("sample_tokens")
@pytest.mark.parametrize("name", ["fuserl-triton", "fuserl-native"])
def test_both_samplers_of_a_gpu_are_timed(name: str) -> None:
    if name == "fuserl-native" and (absent := native.why_absent("cuda")) is not None:
        pytest.skip(absent)
    case = Case(
        op="sample_tokens", pass_name="forward", device="cuda", dtype="bf16",
        num_rows=256, vocab_size=32000, temperature=0.8, top_p=0.95,
    )  # fmt: skip
    problem = OPS[case.op].problem(case)
    provider = next(p for p in providers(case.op) if p.name == name)
    outputs, _ = Call(problem, provider.make(case), provider.backend).run()
    assert problem.truth.value_error(outputs) < 1e-4


@pytest.mark.gpu
@pytest.mark.covers("gae")
def test_a_call_that_waits_for_the_device_is_not_captured() -> None:
    problem = OPS["gae"].problem(dataclasses.replace(tokens("gae"), device="cuda"))
    waits = Call(problem, lambda *inputs: (inputs[0] * float(inputs[0].sum()),), None)
    with pytest.raises(Unavailable, match="cannot be captured"):
        Replay(waits)


# --- inside a decoder layer


@pytest.mark.parametrize("op", ["rotary", "rotary_kv_write", "glu"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_decoder_provider_is_right(op: str, dtype: str) -> None:
    for pass_name in OPS[op].passes:
        case = Case(
            op=op, pass_name=pass_name, device="cpu", dtype=dtype, num_rows=5, hidden_size=256
        )
        problem = OPS[op].problem(case)
        chosen = [p for p in providers(op) if p.name != "torch-compile"]
        assert OPS[op].cost(case).num_bytes > 0
        for provider in chosen:
            result, _ = check(problem, provider, None)
            if result.status != "unavailable":
                assert result.status == "timed", (provider.name, result.reason)
                assert result.error is not None
                assert result.error.value < (1e-5 if dtype == "fp32" else 0.1), provider.name

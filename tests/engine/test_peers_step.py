"""benchmarks/peers_step.py: its work is as told, and it tells what it measured."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl.algorithms import ALGORITHMS
from fuserl.policy import load_policy

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers_step.py"

has_grpo = pytest.mark.skipif("grpo" not in ALGORITHMS, reason="the trainer has no grpo")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("peers_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prompts(tmp_path: Path, policy_folder: Path) -> Path:
    """Fewer than a step of ppo takes."""
    vocab_size = load_policy(policy_folder).model.config.vocab_size
    ids = torch.randint(vocab_size, (40, 32), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"ids": row, "text": "a text"} for row in ids.tolist()]))
    return file


@pytest.fixture
def flags(prompts: Path, policy_folder: Path, reward_folder: Path) -> Callable[..., list[str]]:
    def make(algorithm: str, *more: str) -> list[str]:
        flags = ["--algorithm", algorithm, "--model", str(policy_folder), "--threads", "1"]
        flags += ["--prompts", str(prompts), "--steps", "3", "--warm-steps", "1", *more]
        if algorithm == "ppo":
            flags += ["--reward-model", str(reward_folder), "--value-model", str(reward_folder)]
        return flags

    return make


@pytest.mark.parametrize(
    ("algorithm", "more", "kl_coef", "epochs"),
    [
        ("ppo", [], 0.05, 1),
        ("ppo", ["--num-epochs", "2"], 0.05, 2),
        pytest.param("grpo", [], 0.0, 1, marks=has_grpo),
        pytest.param("grpo", ["--kl-coef", "0.04"], 0.04, 1, marks=has_grpo),
    ],
)
def test_a_line_tells_the_time_of_each_phase(
    script: Any,
    flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    algorithm: str,
    more: list[str],
    kl_coef: float,
    epochs: int,
) -> None:
    script.main(flags(algorithm, *more))
    found = json.loads(capsys.readouterr().out)
    assert found["what"] == f"fuserl_{algorithm}"
    assert (found["kl_coef"], found["epochs"]) == (kl_coef, epochs)
    assert found["seen"] == len(found["samples"]) == 3
    for step in found["samples"]:
        phases = step["gen"] + step["score"] + step["shape"] + step["update"]
        assert phases == pytest.approx(step["total"], rel=0.02)  # clocks are read between
        assert 0 < step["reward"] < step["score"]
    assert found["completion_tok_s"] == pytest.approx(64 * 64 / found["total_s"])
    assert found["peak_rss_mb"] >= found["rss_before_steps_mb"] > 0
    # The sampler and the trainer agree before the first update.
    assert found["first_ratio"] == pytest.approx(1.0, abs=1e-3)


def test_a_step_trains_policy_and_critic(script: Any, flags: Callable[..., list[str]]) -> None:
    trainer = script.Trainer(script.parse(flags("ppo")))
    modules = (trainer.learner.policy, trainer.learner.models.critic)
    before = [[p.detach().clone() for p in module.parameters()] for module in modules]
    trainer.step(0)
    for module, old in zip(modules, before, strict=True):
        moved = [not torch.equal(p, q) for p, q in zip(module.parameters(), old, strict=True)]
        assert all(moved)


def test_prompts_are_taken_in_order_and_again(
    script: Any, flags: Callable[..., list[str]], prompts: Path
) -> None:
    trainer = script.Trainer(script.parse(flags("ppo")))
    ids = [tuple(row["ids"]) for row in json.loads(prompts.read_text())]
    first, second = (trainer._chosen(number) for number in range(2))
    assert [prompt.ids for prompt in first] == [*ids, *ids[:24]]
    assert second[0].ids == ids[24]


@has_grpo
def test_samples_of_a_prompt_stand_together(script: Any, flags: Callable[..., list[str]]) -> None:
    trainer = script.Trainer(script.parse(flags("grpo")))
    chosen = trainer._chosen(0)
    assert len(chosen) == 64
    assert len({prompt.ids for prompt in chosen[:8]}) == 1
    assert len({prompt.ids for prompt in chosen}) == 8


def test_disturbed_steps_are_left_out_where_enough_are_quiet(script: Any) -> None:
    steps = [{"foreign": foreign} for foreign in (0.5, 0.0, 0.05, 0.01, 0.9)]
    used, is_quiet = script.least_disturbed(steps)
    assert is_quiet
    assert [step["foreign"] for step in used] == [0.0, 0.05, 0.01]
    used, is_quiet = script.least_disturbed(steps[:2] + steps[4:] * 2)
    assert not is_quiet
    assert [step["foreign"] for step in used] == [0.0, 0.5, 0.9]


def test_prompts_of_other_lengths_are_refused(
    script: Any, flags: Callable[..., list[str]], prompts: Path
) -> None:
    prompts.write_text(json.dumps([{"ids": [1] * 32}, {"ids": [1] * 31}]))
    with pytest.raises(ValueError, match="entry 1: 31 ids, not 32"):
        script.Trainer(script.parse(flags("ppo")))


@pytest.mark.parametrize(
    ("algorithm", "more", "message"),
    [
        ("grpo", ["--value-model", "x"], "grpo takes neither"),
        ("ppo", ["--kl-coef", "0.1"], "--kl-coef is of grpo"),
        ("ppo", ["--steps", "2"], "--steps must be at least 3"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    script: Any,
    flags: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    algorithm: str,
    more: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        script.parse(flags(algorithm, *more))
    assert message in capsys.readouterr().err

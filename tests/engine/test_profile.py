"""`fuserl profile` on a tiny model: what it writes, says and refuses."""

import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl import cli, profile
from fuserl.bench.timing import Ceilings
from fuserl.bench.traces import OUTSIDE
from fuserl.profile_config import ProfileConfig
from fuserl.stages.rl_metrics import range_of

CPU = Ceilings(1e10, 1e11, "fp32")
PHASES = ["rollout", "score", "shape", "update"]
SMALL = ["--steps=3", "--batch-size=4", "--microbatch-size=2", "--max-new-tokens=5"]


@pytest.fixture
def data(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def flags(data: Path, policy_folder: Path, reward_folder: Path) -> Callable[..., list[str]]:
    def make(out: Path, *more: str) -> list[str]:
        models = [f"--model={policy_folder}", f"--reward-model={reward_folder}"]
        return ["profile", *models, f"--data={data}", f"--out={out}", *SMALL, *more]

    return make


def ranges(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["name"] for event in events if event["name"].startswith("fuserl/")]


def test_it_tells_where_a_step_spends_its_time(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the ceilings of this machine."""
    out = tmp_path / "profile"
    recomputing = ["--old-logprobs=recomputed", "--num-minibatches=2"]
    assert cli.main(flags(out, *recomputing)) == 0
    said = capsys.readouterr().out
    phases = ["rollout", "score", "recompute", "shape", "update"]
    assert sorted(p.name for p in out.iterdir()) == [
        "memory_events.json",
        "profile.json",
        "trace.json",
    ], "no model, no checkpoint, no metrics"

    found = json.loads((out / "profile.json").read_text())
    assert [phase["name"] for phase in found["phases"]] == [*phases, "step"]
    for phase in found["phases"]:
        numbers = [phase[key] for key in ("median_seconds", "tokens_per_second", "share_of_limit")]
        numbers += [phase["limit_seconds"], phase["peak_bytes"]]
        if phase["name"] != "shape":
            numbers += [phase["num_flops"], phase["mfu"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers), phase
        assert f"| {phase['name']} |" in said
    assert found["options"]["old_logprobs"] == "recomputed"
    assert found["files"] == {"trace": "trace.json", "memory": "memory_events.json"}
    *parts, step = found["phases"]
    for key in ("num_flops", "limit_seconds", "median_seconds"):
        assert step[key] == pytest.approx(sum(part[key] for part in parts))
    assert found["completion_tokens"] == step["num_tokens"] <= 4 * 5

    assert set(found["operators"]) == set(phases)
    assert found["kernels"] == {}
    for operators in found["operators"].values():
        assert 0 < len(operators) <= 10
        seconds = [one["seconds"] for one in operators]
        assert seconds == sorted(seconds, reverse=True)
        assert sum(one["share"] for one in operators) <= 1 + 1e-6
    assert any(one["name"] == OUTSIDE for one in found["operators"]["rollout"])
    assert any(one["name"].startswith("aten::") for one in found["operators"]["update"])

    trace = json.loads((out / "trace.json").read_text())
    assert sorted(ranges(trace["traceEvents"])) == sorted(map(range_of, phases))
    memory = json.loads((out / "memory_events.json").read_text())
    assert memory["columns"] == ["microseconds", "bytes", "phase"]
    assert {phase for _, _, phase in memory["events"]} >= set(phases)
    times = [at for at, _, _ in memory["events"]]
    assert times == sorted(times)
    total = peak = 0
    for _, num_bytes, phase in memory["events"]:
        total += num_bytes
        if phase == "update":
            peak = max(peak, total)
    assert memory["phases"]["update"]["peak_bytes"] == peak > 0


def test_what_a_function_costs_is_its_own(
    policy_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model in scoring there is nothing to count; a large trace is compressed."""
    monkeypatch.setattr(profile, "measure_ceilings", lambda device, dtype: CPU)
    monkeypatch.setattr(profile, "LARGE_TRACE", 1000)
    config = ProfileConfig(
        model=str(policy_folder),
        data=str(data),
        out=str(tmp_path / "out"),
        algorithm="grpo",
        num_samples=2,
        batch_size=3,
        max_new_tokens=4,
        warmup_steps=1,
        num_operators=2,
        steps=1,
    )
    calls: list[int] = []

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [float(len(text)) for text in completions]

    found = profile.profile_step(config, config.data, reward)
    assert calls == [6] * 4, "warm-up, timed, memory, traced"
    score = next(phase for phase in found["phases"] if phase["name"] == "score")
    assert (score["num_flops"], score["share_of_limit"]) == (0, None)
    assert found["files"]["trace"] == "trace.json.gz"
    assert not (tmp_path / "out" / "trace.json").exists()
    with gzip.open(tmp_path / "out" / "trace.json.gz", "rt") as file:
        assert sorted(ranges(json.load(file)["traceEvents"])) == sorted(map(range_of, PHASES))
    assert all(len(operators) <= 2 for operators in found["operators"].values())


def test_a_profile_is_written_over_a_profile_alone(
    flags: Callable[..., list[str]],
    tmp_path: Path,
    policy_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(profile, "measure_ceilings", lambda device, dtype: CPU)
    out = tmp_path / "out"
    out.mkdir()
    stale = out / "trace.json.gz"
    stale.write_text("of an earlier profile")
    assert cli.main(flags(out, "--warmup-steps=1")) == 1
    assert "holds a profile: choose another --out, or add --overwrite" in capsys.readouterr().err
    assert cli.main(flags(out, "--warmup-steps=1", "--overwrite")) == 0
    assert not stale.exists()

    for name in ("summary.json", "metrics.jsonl", "config.json", "model-1.safetensors"):
        held = tmp_path / name.partition(".")[0]
        held.mkdir()
        (held / name).write_text("{}")
        assert cli.main(flags(held, "--overwrite")) == 1
        assert "holds a run or a model, and a profile is written over" in capsys.readouterr().err
        assert [path.name for path in held.iterdir()] == [name]
    before = sorted(path.name for path in policy_folder.iterdir())
    assert cli.main(flags(policy_folder, "--overwrite")) == 1
    assert sorted(path.name for path in policy_folder.iterdir()) == before


def test_a_run_of_the_same_options_is_not_changed_by_it(
    policy_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy that is handed over by its folder stays as it is on the disk."""
    monkeypatch.setattr(profile, "measure_ceilings", lambda device, dtype: CPU)
    weights = (policy_folder / "model.safetensors").read_bytes()
    config = ProfileConfig(
        model=str(policy_folder), data=str(data), out=str(tmp_path / "out"), batch_size=2
    )
    before = torch.is_deterministic_algorithms_warn_only_enabled()
    profile.profile_step(config, config.data, lambda completions, **_: [1.0] * len(completions))
    assert torch.is_deterministic_algorithms_warn_only_enabled() == before
    assert (policy_folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume"], "resume makes no sense with profile: it writes no run"),
        (["--warmup-steps=0"], "warmup_steps must be at least 1, got 0"),
        (["--num-operators=0"], "num_operators must be at least 1, got 0"),
        (["--algorithm=grpo"], "num_samples must be at least 2 with grpo"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    more: list[str],
    message: str,
    flags: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(flags(tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reward_is_needed(
    policy_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--model={policy_folder}", f"--data={data}", f"--out={tmp_path / 'out'}"]
    assert cli.main(["profile", *flags]) == 1
    assert (
        "reward_model is missing (a Python function needs profile_step)" in capsys.readouterr().err
    )

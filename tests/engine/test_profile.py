"""`fuserl profile` on a tiny model: what it writes, says and refuses."""

import dataclasses
import gzip
import json
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import Interval

from fuserl import cli, profile
from fuserl.bench.timing import Ceilings
from fuserl.bench.traces import OUTSIDE, read_trace
from fuserl.profile import run_profile
from fuserl.profile_config import ProfileConfig
from fuserl.stages.rl_metrics import range_of

CPU = Ceilings(1e10, 1e11, "fp32")
PHASES = ["rollout", "score", "shape", "update"]
SMALL: dict[str, Any] = {"batch_size": 4, "microbatch_size": 2, "max_new_tokens": 5}


@pytest.fixture
def data(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(data: Path, policy_folder: Path, reward_folder: Path) -> Callable[..., ProfileConfig]:
    def make(out: Path, **options: Any) -> ProfileConfig:
        given = {"model": policy_folder, "reward_model": reward_folder, "data": data, "out": out}
        return ProfileConfig(**{name: str(path) for name, path in given.items()}, **SMALL | options)

    return make


@pytest.fixture
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "measure_ceilings", lambda device, dtype: CPU)


def ranges(events: Sequence[dict[str, Any]]) -> list[str]:
    return [event["name"] for event in events if event["name"].startswith("fuserl/")]


def test_it_tells_where_a_step_spends_its_time(
    config: Callable[..., ProfileConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the ceilings of this machine."""
    out = tmp_path / "profile"
    run_profile(config(out, old_logprobs="recomputed", num_minibatches=2))
    said = capsys.readouterr().out
    phases = ["rollout", "score", "recompute", "shape", "update"]
    left = sorted(path.name for path in out.iterdir())
    assert left == ["memory_events.json", "profile.json", "trace.json"], "no model, no run"

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


@pytest.mark.usefixtures("known_ceilings")
def test_what_a_function_costs_is_its_own(
    config: Callable[..., ProfileConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a model in scoring there is nothing to count; a large trace is compressed."""
    monkeypatch.setattr(profile, "LARGE_TRACE", 1000)
    calls: list[int] = []

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        return [float(len(text)) for text in completions]

    options: dict[str, Any] = {"algorithm": "grpo", "num_samples": 2, "batch_size": 3, "steps": 1}
    asked = config(tmp_path / "out", warmup_steps=1, num_operators=2, **options)
    found = profile.profile_step(asked, asked.data, reward)
    assert calls == [6] * 4, "warm-up, timed, memory, traced"
    score = next(phase for phase in found["phases"] if phase["name"] == "score")
    assert (score["num_flops"], score["share_of_limit"]) == (0, None)
    assert found["files"]["trace"] == "trace.json.gz"
    assert not (tmp_path / "out" / "trace.json").exists()
    with gzip.open(tmp_path / "out" / "trace.json.gz", "rt") as file:
        assert sorted(ranges(json.load(file)["traceEvents"])) == sorted(map(range_of, PHASES))
    assert all(len(operators) <= 2 for operators in found["operators"].values())


@pytest.mark.usefixtures("known_ceilings")
@pytest.mark.parametrize(
    "options",
    [
        {"frozen_layers": 1, "reference": "hydra", "critic": "hydra"},
        {"critic": "shared", "critic_head": "mlp"},
        {"lora_rank": 2, "activation_checkpointing": True},
        {"dtype": "bfloat16", "algorithm": "reinforce", "kl_coef": 0.0},
    ],
)
def test_it_profiles_what_a_run_may_be(
    options: dict[str, Any], config: Callable[..., ProfileConfig], tmp_path: Path
) -> None:
    asked = config(tmp_path, warmup_steps=1, **options)
    assert asked.reward_model is not None
    found = profile.profile_step(asked, asked.data, asked.reward_model)
    for phase in found["phases"]:
        assert math.isfinite(phase["share_of_limit"])
        assert phase["share_of_limit"] > 0
    assert found["phases"][0]["num_flops"] > 0


@pytest.mark.usefixtures("known_ceilings")
def test_a_profile_is_written_over_a_profile_alone(
    config: Callable[..., ProfileConfig], tmp_path: Path, policy_folder: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stale = out / "trace.json.gz"
    stale.write_text("of an earlier profile")
    with pytest.raises(ValueError, match="holds a profile: choose another --out, or add --overw"):
        run_profile(config(out))
    assert stale.exists()
    run_profile(config(out, overwrite=True, warmup_steps=1))
    assert not stale.exists()

    for name in ("summary.json", "metrics.jsonl", "config.json", "model-1.safetensors"):
        held = tmp_path / name.partition(".")[0]
        held.mkdir()
        (held / name).write_text("{}")
        with pytest.raises(ValueError, match="holds a run or a model, and a profile is written"):
            run_profile(config(held, overwrite=True))
        assert [path.name for path in held.iterdir()] == [name]
    before = {path.name: path.read_bytes() for path in policy_folder.iterdir()}
    with pytest.raises(ValueError, match="holds a run or a model"):
        run_profile(config(policy_folder, overwrite=True))
    run_profile(config(tmp_path / "beside", warmup_steps=1))
    assert {path.name: path.read_bytes() for path in policy_folder.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resume": True}, "resume makes no sense with profile: it writes no run"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
        ({"num_operators": 0}, "num_operators must be at least 1, got 0"),
        ({"algorithm": "grpo"}, "num_samples must be at least 2 with grpo"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: dict[str, Any],
    message: str,
    config: Callable[..., ProfileConfig],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path / "out", **options)


def test_a_folder_that_cannot_be_made_is_told_before_any_work(
    config: Callable[..., ProfileConfig], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    asked = dataclasses.replace(config(tmp_path / "file"), model=str(tmp_path / "no model"))
    with pytest.raises(FileExistsError):
        run_profile(asked)


def test_a_reward_is_needed(config: Callable[..., ProfileConfig], tmp_path: Path) -> None:
    asked = dataclasses.replace(config(tmp_path / "out"), reward_model=None)
    with pytest.raises(ValueError, match=r"reward_model is missing \(a Python function needs"):
        run_profile(asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("known_ceilings")
def test_the_command_takes_the_options_of_rl(
    config: Callable[..., ProfileConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro", reason="the command line needs tyro")
    asked = config(tmp_path / "out")
    flags = [f"--{name}={getattr(asked, name)}" for name in ("model", "data", "out")]
    flags += [f"--reward-model={asked.reward_model}", "--algorithm=grpo", "--num-samples=3"]
    flags += ["--batch-size=2", "--max-new-tokens=4", "--warmup-steps=1", "--steps=2"]
    assert cli.main(["profile", *flags]) == 0
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert found["sequences"] == 6
    assert "trace.json, memory_events.json, profile.json" in capsys.readouterr().out
    assert cli.main(["profile", *flags]) == 1
    assert "fuserl profile: " in capsys.readouterr().err


def test_kernels_are_told_from_the_host_and_from_ranges() -> None:
    """Events as a profile with a device gives them, where a range is there twice."""

    def event(name: str, start: float, end: float, *, device: bool = False) -> Any:
        kind = DeviceType.CUDA if device else DeviceType.CPU
        own = 0.0 if device else end - start
        return SimpleNamespace(
            name=name, time_range=Interval(start, end), device_type=kind, self_cpu_time_total=own
        )

    events = [
        event("fuserl/score", 0, 100),
        event("fuserl/score", 5, 90, device=True),
        event("aten::mm", 10, 20),
        event("gemm", 15, 55, device=True),
        event("gemm", 60, 70, device=True),
        event("copy", 71, 72, device=True),
        event("fuserl/update", 100, 140),
        event("gemm", 101, 141, device=True),
        event("before any phase", -5, -1),
    ]
    trace = read_trace(SimpleNamespace(events=lambda: events), 2)  # type: ignore[arg-type]
    assert [one.name for one in trace.operators["score"]] == [OUTSIDE, "aten::mm"]
    first, second = trace.kernels["score"]
    assert (first.name, first.calls, first.share) == ("gemm", 2, 0.5)
    assert (first.seconds, second.name) == (pytest.approx(50e-6), "copy")
    assert [one.calls for one in trace.kernels["update"]] == [1]


@pytest.mark.gpu
@pytest.mark.covers("rollout")
def test_a_gpu_gives_kernels_and_a_snapshot(
    config: Callable[..., ProfileConfig], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_profile(config(out, device="cuda", dtype="bfloat16"))
    found = json.loads((out / "profile.json").read_text())
    assert found["files"]["memory"] == "memory_snapshot.pickle"
    with (out / "memory_snapshot.pickle").open("rb") as file:
        snapshot = pickle.load(file)
    assert snapshot["segments"]
    assert any(snapshot["device_traces"])
    for phase in ("rollout", "score", "update"):
        assert found["kernels"][phase], "of the device"
    for phase in found["phases"]:
        assert phase["peak_bytes"] > 0
        assert math.isfinite(phase["limit_seconds"])

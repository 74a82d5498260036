"""A run in its folder: what may be started, resumed and overwritten, and what is left behind."""

import dataclasses
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fuserl.config import RLConfig, TrainConfig
from fuserl.interrupt import Interrupted
from fuserl.metrics import MetricsLog, WeightedMean, read_metrics
from fuserl.optimizer import Optimizer
from fuserl.run import Run, prepare_folder, remove_run

STEPS = 6


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(model="m", data="d", out=str(tmp_path / "run"), learning_rate=0.1)


class Loop:
    """A stage in small: fits a line, may be told to stop or to fail within a step."""

    def __init__(self, config: TrainConfig, stage: str = "toy", **facts: Any) -> None:
        self.stage, self.config = stage, config
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)
        modules = {"model": self.model}
        self.optimizer = Optimizer(modules, config, total_steps=STEPS)
        self.run = Run(
            stage,
            config,
            total_steps=STEPS,
            modules=modules,
            optimizer=self.optimizer,
            facts=facts,
        )
        self.did: list[int] = []

    def train(
        self,
        stop_at: int | None = None,
        fail_before: int | None = None,
        fail_after: int | None = None,
    ) -> dict[str, Any]:
        prepare_folder(self.stage, self.config)
        with self.run as run:
            for step in run.steps():
                if step == fail_before:
                    raise RuntimeError("before the weights moved")
                if step == stop_at:
                    signal.raise_signal(signal.SIGINT)
                    run.check()
                x = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
                loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                loss.backward()
                self.optimizer.step()
                if step == fail_after:
                    raise RuntimeError("after the weights moved")
                self.did.append(step)
                run.log(step, {"loss": loss.detach(), "seconds/step": 0.5})
            return run.finish({"loss": loss.item()})

    def weights(self) -> list[float]:
        return [value for p in self.model.parameters() for value in p.flatten().tolist()]


def lines(out: str) -> list[dict[str, Any]]:
    return list(read_metrics(Path(out) / "metrics.jsonl"))


@pytest.fixture
def whole(config: TrainConfig, tmp_path: Path) -> tuple[list[float], list[dict[str, Any]]]:
    """Weights and metrics of a run that was never interrupted."""
    loop = Loop(dataclasses.replace(config, out=str(tmp_path / "whole")))
    loop.train()
    return loop.weights(), lines(loop.config.out)


def test_a_finished_run(config: TrainConfig) -> None:
    assert prepare_folder("toy", config) is None
    summary = Loop(config).train()
    out = Path(config.out)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.jsonl", "summary.json"]
    saved = json.loads((out / "summary.json").read_text())
    assert saved.pop("config") == dataclasses.asdict(config)
    assert saved == summary
    assert summary["stage"] == "toy"
    assert [line["step"] for line in lines(config.out)] == list(range(1, STEPS + 1))

    with pytest.raises(ValueError, match=r"holds a finished run: choose another --out, or add"):
        prepare_folder("toy", config)
    assert prepare_folder("toy", dataclasses.replace(config, resume=True)) == summary
    assert prepare_folder("toy", dataclasses.replace(config, overwrite=True)) is None
    assert (out / "summary.json").exists(), "nothing is lost before the new run begins"


@pytest.mark.parametrize("step", range(STEPS))
def test_stop_and_resume_is_the_same_run(
    step: int, config: TrainConfig, whole: tuple[list[float], list[dict[str, Any]]]
) -> None:
    message = rf"toy stopped after step {step} of {STEPS}, saved in .*run; to go on.*--resume"
    with pytest.raises(Interrupted, match=message):
        Loop(config).train(stop_at=step)
    with pytest.raises(ValueError, match="holds an unfinished run: add --resume, or --overwrite"):
        prepare_folder("toy", config)
    again = dataclasses.replace(config, resume=True)
    assert prepare_folder("toy", again) is None
    loop = Loop(again)
    loop.train()
    assert loop.did == list(range(step, STEPS))
    assert loop.weights() == whole[0]
    assert lines(config.out) == whole[1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_saves_the_last_whole_step(
    config: TrainConfig, whole: tuple[list[float], list[dict[str, Any]]]
) -> None:
    with pytest.raises(RuntimeError):
        Loop(config).train(fail_before=4)
    loop = Loop(dataclasses.replace(config, resume=True))
    loop.train()
    assert loop.did == [4, 5]
    assert loop.weights() == whole[0]


def test_an_error_within_an_update_falls_back_to_the_last_checkpoint(
    config: TrainConfig, whole: tuple[list[float], list[dict[str, Any]]]
) -> None:
    """The state of the step is torn; what was saved before it is not overwritten."""
    config = dataclasses.replace(config, save_every=2)
    with pytest.raises(RuntimeError):
        Loop(config).train(fail_after=5)
    loop = Loop(dataclasses.replace(config, resume=True))
    loop.train()
    assert loop.did == [4, 5]
    assert loop.weights() == whole[0]
    assert lines(config.out) == whole[1]


def test_an_error_before_the_first_step_leaves_nothing_to_resume(config: TrainConfig) -> None:
    with pytest.raises(RuntimeError):
        Loop(config).train(fail_before=0)
    assert prepare_folder("toy", config) is None
    with pytest.raises(ValueError, match="there is no run to resume in"):
        prepare_folder("toy", dataclasses.replace(config, resume=True))


def test_changed_options_are_refused_by_name(config: TrainConfig) -> None:
    with pytest.raises(Interrupted):
        Loop(config).train(stop_at=2)
    changed = dataclasses.replace(config, resume=True, learning_rate=0.2, seed=3)
    with pytest.raises(
        ValueError, match=r"options differ.*seed: 0 -> 3; learning_rate: 0.1 -> 0.2"
    ):
        Loop(changed).train()
    allowed = dataclasses.replace(config, resume=True, microbatch_size=7, save_every=3)
    Loop(allowed).train()


def test_another_stage_and_other_facts_are_refused(config: TrainConfig) -> None:
    with pytest.raises(Interrupted):
        Loop(config, data={"rows": 3}).train(stop_at=2)
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(ValueError, match="holds a run of toy, not of other"):
        Loop(again, stage="other").train()
    with pytest.raises(ValueError, match="the data differs from that of the run to resume"):
        Loop(again, data={"rows": 4}).train()
    Loop(again, data={"rows": 3}).train()


def test_a_finished_run_is_resumed_only_as_it_was(config: TrainConfig) -> None:
    Loop(config).train()
    again = dataclasses.replace(config, resume=True, microbatch_size=7)
    assert prepare_folder("toy", again) is not None
    with pytest.raises(ValueError, match=r"options differ.*seed: 0 -> 3"):
        prepare_folder("toy", dataclasses.replace(again, seed=3))
    with pytest.raises(ValueError, match="holds a run of toy, not of other"):
        prepare_folder("other", again)


@pytest.mark.parametrize("option", ["model", "reward_model", "critic_model"])
@pytest.mark.parametrize("flag", ["resume", "overwrite", None])
def test_a_run_does_not_write_over_what_it_starts_from(
    option: str, flag: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"model": "m", "data": "d", **({flag: True} if flag else {})}
    for start, out in (("run", tmp_path / "run"), (str(tmp_path / "run/critic"), "x/../run")):
        config = RLConfig(**{**options, option: start, "out": str(out)})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{option} .* would be written over"):
            prepare_folder("rl", config)


def test_a_small_configuration_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(model="tiny", data="d", out="tiny")
    assert prepare_folder("sft", config) is None
    with pytest.raises(ValueError, match="model tiny would be written over"):
        prepare_folder("reward", config)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_model_that_is_no_run_of_ours_is_kept(name: str, config: TrainConfig) -> None:
    out = Path(config.out)
    out.mkdir()
    (out / name).touch()
    with pytest.raises(ValueError, match="holds a model: choose another --out, or add --overwrite"):
        prepare_folder("toy", config)
    assert prepare_folder("toy", dataclasses.replace(config, overwrite=True)) is None


def test_overwriting_removes_what_is_ours_and_nothing_else(config: TrainConfig) -> None:
    with pytest.raises(Interrupted):
        Loop(config).train(stop_at=3)
    out = Path(config.out)
    ours = ["summary.json", "config.json", "model.safetensors", "fuserl.json", "tokenizer.json"]
    others = ["notes.txt", "data/rows.jsonl", "critic/notes.txt", "model-1-of-2.safetensors"]
    for name in (*ours, "critic/config.json", "critic/model.safetensors", *others):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    over = dataclasses.replace(config, overwrite=True)
    with Loop(over).run:
        left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert left == {*others, "metrics.jsonl"}
        assert (out / "metrics.jsonl").read_text() == ""
    (out / "critic/notes.txt").unlink()
    remove_run(out)
    assert not (out / "critic").exists()


def test_starting_over_forgets_the_unfinished_run(
    config: TrainConfig, whole: tuple[list[float], list[dict[str, Any]]]
) -> None:
    with pytest.raises(Interrupted):
        Loop(config).train(stop_at=3)
    over = dataclasses.replace(config, overwrite=True)
    assert prepare_folder("toy", over) is None
    loop = Loop(over)
    loop.train()
    assert loop.did == list(range(STEPS))
    assert lines(config.out) == whole[1]


def test_the_first_signal_waits_and_the_second_kills(config: TrainConfig) -> None:
    def two_signals() -> None:
        with Loop(config).run:
            signal.raise_signal(signal.SIGINT)  # noted
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        two_signals()


def test_sigterm_stops_too(config: TrainConfig) -> None:
    def one_signal() -> None:
        with Loop(config).run as run:
            signal.raise_signal(signal.SIGTERM)
            run.check()

    with pytest.raises(Interrupted, match="stopped after step 0"):
        one_signal()


# metrics.jsonl


def test_a_torn_last_line_does_not_stop_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1.0}\n{"step": 2, "a": 2.0}\n{"step": 3, "a"')
    log = MetricsLog(path, "toy", first_step=1)
    log.write(2, {"a": torch.tensor(0.1)})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_survive_being_read_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "toy", first_step=0)
    log.write(1, {"third": torch.tensor(1 / 3), "nan": float("nan"), "count": 3})
    before = path.read_text()
    MetricsLog(path, "toy", first_step=1)
    assert path.read_text() == before
    MetricsLog(path, "toy", first_step=0)
    assert path.read_text() == ""


def test_means_weigh_their_parts() -> None:
    means = WeightedMean()
    means.add({"a": torch.tensor(1.0)}, weight=3.0)
    means.add({"a": torch.tensor(5.0), "b": torch.tensor(2.0)}, weight=torch.tensor(1.0))
    means.add({"c": torch.tensor(9.0)}, weight=0.0)
    found = {name: value.item() for name, value in means.mean().items()}
    assert found == {"a": 2.0, "b": 2.0, "c": 0.0}

"""One stage's run in one folder: its steps, metrics, progress bar, checkpoint and Ctrl-C.

The stages' loops stay plain: `for step in run.steps(): ...; run.log(...)`.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn
from tqdm import tqdm

from fuserl import tokenizer
from fuserl.allocator import keep_freed_memory
from fuserl.checkpoint import Checkpoint
from fuserl.config import TrainConfig
from fuserl.interrupt import Interrupted, InterruptFlag
from fuserl.metrics import Metrics, MetricsLog
from fuserl.model.adapter_folder import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from fuserl.model.config import SMALL_NAMES
from fuserl.model.config_json import CONFIG_FILE, GENERATION_FILE
from fuserl.model.notes import NOTES_FILE
from fuserl.model.stored import CRITIC_FILE, HEAD_FILE, INDEX_FILE, WEIGHTS_FILE, shards_in
from fuserl.optimizer import Optimizer

_MAY_DIFFER = {
    *("out", "resume", "overwrite", "save_every", "microbatch_size", "device"),
    "activation_checkpointing",
}
"""Options that a resumed run may change: none of them changes what is computed."""

ADAPTER_FOLDER = "adapter"
"""Inside a run's folder: its low-rank adapters by themselves, as PEFT stores them."""

_LEFT_BEHIND = (
    *("summary.json", "metrics.jsonl"),
    *(CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, HEAD_FILE, CRITIC_FILE, GENERATION_FILE, NOTES_FILE),
)
"""Files that a run writes into its folder and, with a critic, into critic/, beside shards
and the tokenizer's."""


class Run:
    """Context manager around a stage's loop. On entry a resumed run is restored; on an error the
    state of the last whole step is saved, unless weights have moved since."""

    def __init__(
        self,
        stage: str,
        config: TrainConfig,
        *,
        total_steps: int,
        modules: Mapping[str, nn.Module],
        optimizer: Optimizer,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """facts: what else must be as it was when a run is resumed, by the names that messages
        give it and as JSON holds it."""
        self._facts = dict(facts or {})
        self.out = Path(config.out)
        self.total_steps = total_steps
        self.step = 0  # whole steps done
        self.seconds = 0.0  # of this run and the ones it resumes
        self._stage, self._config = stage, config
        self._modules, self._optimizer = modules, optimizer
        self._checkpoint = Checkpoint(self.out)
        self._interrupt = InterruptFlag()
        self._saved_at = -1

    def __enter__(self) -> "Run":
        keep_freed_memory()
        if self._config.resume:
            self._restore()
        elif self._config.overwrite:
            remove_run(self.out)
        self._optimizer_steps = self._optimizer.steps
        self._began = time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)
        self._log = MetricsLog(self.out / "metrics.jsonl", self._stage, self.step)
        self._bar = tqdm(
            total=self.total_steps, initial=self.step, desc=self._stage, unit="step", mininterval=1
        )
        self._interrupt.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interrupt.__exit__(kind, error, trace)
        self._bar.close()
        if error is None:
            return
        interrupted = isinstance(error, Interrupted)
        if self._optimizer.steps == self._optimizer_steps and (self.step > 0 or interrupted):
            self.save()
        if interrupted:
            raise Interrupted(
                f"{self._stage} stopped after step {self.step} of {self.total_steps}, saved in "
                f"{self.out}; to go on, run the same command with --resume"
            ) from None

    def steps(self) -> Iterator[int]:
        """The steps still to do, 0-based; saves between them as the configuration says."""
        every = self._config.save_every
        for step in range(self.step, self.total_steps):
            self.check()
            yield step
            self.step = step + 1
            self._optimizer_steps = self._optimizer.steps
            self._bar.update()
            if every and self.step % every == 0 and self.step < self.total_steps:
                self.save()

    def check(self) -> None:
        """Raise Interrupted if Ctrl-C or SIGTERM came. Long phases that change no weight call
        this; the phase is done again after a resume."""
        self._interrupt.check()

    def log(self, step: int, metrics: Metrics, *, show: tuple[str, ...] = ()) -> None:
        """One line of metrics.jsonl for step `step` (0-based); `show` goes beside the bar."""
        numbers = self._log.write(step + 1, metrics)
        if show:
            self._bar.set_postfix({name.split("/")[-1]: f"{numbers[name]:.3g}" for name in show})

    def save(self) -> None:
        if self._saved_at == self.step:
            return
        self._checkpoint.save(
            self._modules,
            self._optimizer,
            {
                "stage": self._stage,
                "step": self.step,
                "seconds": self._elapsed(),
                "config": dataclasses.asdict(self._config),
                "facts": self._facts,
            },
        )
        self._saved_at = self.step

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write summary.json, the options with it, and drop the checkpoint. Call it when the
        model is saved."""
        whole = {"stage": self._stage, **summary, "seconds": round(self._elapsed(), 2)}
        kept = {**whole, "config": dataclasses.asdict(self._config)}
        (self.out / "summary.json").write_text(json.dumps(kept, indent=2) + "\n")
        self._checkpoint.remove()
        return whole

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._began

    def _restore(self) -> None:
        progress = self._checkpoint.progress()
        for name, fact in self._facts.items():
            if fact != progress["facts"].get(name):
                raise ValueError(
                    f"the {name} differs from that of the run to resume in {self.out}: put back "
                    "what the run began with, or start again with --overwrite"
                )
        self._checkpoint.load(self._modules, self._optimizer)
        self.step = self._saved_at = progress["step"]
        self.seconds = progress["seconds"]


def prepare_folder(stage: str, config: TrainConfig) -> dict[str, Any] | None:
    """Look at --out before any work is done; nothing in it is touched.

    Returns the summary of a finished run that is asked to resume (nothing is left to do), else
    None. Raises ValueError if the folder holds what would be lost, or not the run to resume.
    """
    out = Path(config.out)
    _refuse_own_start(stage, config)
    summary, checkpoint = out / "summary.json", Checkpoint(out)
    if config.resume:
        if not holds_run(out):
            raise ValueError(f"there is no run to resume in {out}")
        unfinished = checkpoint.exists()
        before = checkpoint.progress() if unfinished else json.loads(summary.read_text())
        _check_same_run(before, stage, config)
        return None if unfinished else {k: v for k, v in before.items() if k != "config"}
    if config.overwrite:
        return None
    if checkpoint.exists():
        raise ValueError(f"{out} holds an unfinished run: add --resume, or --overwrite to lose it")
    if summary.exists():
        raise ValueError(f"{out} holds a finished run: choose another --out, or add --overwrite")
    if holds_model(out):
        raise ValueError(f"{out} holds a model: choose another --out, or add --overwrite")
    return None


def holds_run(out: Path) -> bool:
    """Whether the folder holds a run, finished or with a checkpoint."""
    return (out / "summary.json").exists() or Checkpoint(out).exists()


def holds_model(out: Path) -> bool:
    return (out / CONFIG_FILE).exists() or any(out.glob("*.safetensors"))


def remove_run(out: Path) -> None:
    """Remove what a run leaves in its folder, and nothing else that may be there."""
    Checkpoint(out).remove()
    critic = out / "critic"
    for folder in (out, critic):
        named = [folder / name for name in _LEFT_BEHIND]
        for path in (*named, *shards_in(folder), *tokenizer.files_in(folder)):
            path.unlink(missing_ok=True)
        templates = folder / "additional_chat_templates"
        if templates.is_dir() and not any(templates.iterdir()):
            templates.rmdir()
    adapter = out / ADAPTER_FOLDER
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        (adapter / name).unlink(missing_ok=True)
    for folder in (critic, adapter):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _refuse_own_start(stage: str, config: TrainConfig) -> None:
    """A run must not write over a model it starts from or is judged by."""
    out = Path(config.out).resolve()
    for option in ("model", "reward_model", "critic_model"):
        source = getattr(config, option, None)
        if source is None or (stage == "sft" and source in SMALL_NAMES):
            continue
        if Path(source).resolve() in (out, out / "critic"):
            raise ValueError(f"{option} {source} would be written over: choose another --out")


def _check_same_run(before: Mapping[str, Any], stage: str, config: TrainConfig) -> None:
    """before: a checkpoint's progress or a summary."""
    if before.get("stage") != stage:  # only the quickstart's summary names none
        raise ValueError(
            f"{config.out} holds a run of {before.get('stage', 'quickstart')}, not of {stage}"
        )
    was, now = before["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [
        f"{name}: {was.get(name)!r} -> {now[name]!r}"
        for name in now
        if name not in _MAY_DIFFER and now[name] != was.get(name)
    ]
    if changed:
        raise ValueError(
            f"the options differ from those of the run to resume in {config.out}: "
            + "; ".join(changed)
        )

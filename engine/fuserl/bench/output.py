"""How a benchmark ends: with tables and a file, or because an answer is wrong."""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from fuserl.bench import report
from fuserl.config import BenchConfig


class WrongAnswer(ValueError):
    """An answer is wrong, so that nothing was timed."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, so that a run cut off leaves the last good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def first_line(error: BaseException) -> str:
    """Of what an exception says."""
    return str(error).strip().partition("\n")[0]


class CaseOnDevice(Protocol):
    @property
    def device(self) -> str:
        """The type of device it runs on."""


class Table(Protocol):
    def table(self) -> str:
        """In Markdown."""

    def to_json(self) -> dict[str, Any]:
        """Everything that was measured."""


CaseT = TypeVar("CaseT", bound=CaseOnDevice)
TableT = TypeVar("TableT", bound=Table)


def run_cases(
    config: BenchConfig,
    cases: Sequence[CaseT],
    run_case: Callable[[CaseT, int, float], TableT],
    units: str,
) -> list[TableT]:
    """Run the cases in turn (run_case: case, rounds, seconds), print their tables and what the
    units mean, and write the JSON that was asked for."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    machine = report.describe_machine(cases[0].device, torch.get_num_threads())
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}\n")
    reports = []
    for case in cases:
        reports.append(run_case(case, config.rounds, config.budget_seconds / len(cases)))
        print(reports[-1].table(), end="\n\n", flush=True)
    print(units)
    if config.json is not None:
        content = {"format": report.FORMAT, "machine": machine}
        write_json(Path(config.json), {**content, "cases": [r.to_json() for r in reports]})
    return reports


def refuse_other_options(config: BenchConfig, options: Collection[str], name: str) -> None:
    """ValueError for an option that was set although the benchmark `name` has no such one."""
    for item in dataclasses.fields(config):
        if item.name not in options and getattr(config, item.name) != item.default:
            raise ValueError(f"{item.name} makes no sense with {name}: it has no such option")


def models_of(config: BenchConfig, measured: Sequence[str], name: str) -> Sequence[str]:
    """Those asked for; ValueError for one that the benchmark `name` does not have."""
    if config.model == "all":
        return measured
    if config.model not in ("tiny", *measured):
        raise ValueError(
            f"model of {name} must be one of {('all', 'tiny', *measured)}, not {config.model!r}"
        )
    return (config.model,)


def table_row(*cells: str) -> str:
    """One row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"

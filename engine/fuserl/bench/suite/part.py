"""One part of the suite: its cases in turn, until its seconds are used up."""

import gc
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fuserl.bench.output import Table, first_line, write_json
from fuserl.bench.rivals import Unavailable
from fuserl.bench.suite.cases import AnyCase, Part, measure, needs
from fuserl.bench.suite.machine import device_state
from fuserl.bench.suite.proof import Proof
from fuserl.bench.timing import Ceilings

FORMAT = 2
CASE_SECONDS = 8.0
"""Of timed rounds; checks and compilation come on top."""
KINDS = {"Case": "op", "StepCase": "decode_steps", "RolloutCase": "rollout", "PhasesCase": "step"}


@dataclass(slots=True)
class Record:
    """The file of a part, written again after each case."""

    path: Path
    part: str
    machine: Mapping[str, Any]
    ceilings: Ceilings
    proof: Proof
    cases: list[dict[str, Any]] = field(default_factory=list)
    not_timed: list[dict[str, str]] = field(default_factory=list)
    is_finished: bool = False

    def keep(self, case: AnyCase, found: Table) -> None:
        """To be written."""
        about = {
            "kind": KINDS[type(case).__name__],
            "title": case.title,
            "needs": needs(case),
            "device_state": device_state(),
        }
        self.cases.append({**about, **found.to_json()})

    def write(self) -> None:
        """Whole or not at all: a run that is cut off leaves the last good file."""
        content = {
            "format": FORMAT,
            "part": self.part,
            "machine": self.machine,
            "ceilings": asdict(self.ceilings),
            "proof": self.proof.to_json(),
            "is_finished": self.is_finished,
            "cases": self.cases,
            "not_timed": self.not_timed,
        }
        write_json(self.path, content)


def time_part(part: Part, record: Record, deadline: float, ops: Collection[str] = ()) -> list[str]:
    """Time what the tests allow, and print each table. Returns what was wrong or broke.

    ops: only cases of these (all where it is empty). deadline: of time.monotonic().
    """
    wrong: list[str] = []
    lost: str | None = None
    for case in part.cases():
        if ops and not set(ops) & set(needs(case)):
            continue
        reason = lost or _why_not(case, record.proof, deadline)
        if reason is None:
            try:
                _release_leftovers()
                seconds = min(CASE_SECONDS, deadline - time.monotonic())
                found = measure(case, record.ceilings, seconds, record.proof)
                record.keep(case, found)
                print(found.table(), end="\n\n", flush=True)
            except Unavailable as absent:
                reason = str(absent)
            except Exception as error:  # the others go on: the machine is lent for minutes
                reason = f"{type(error).__name__}: {first_line(error)}"
                wrong.append(f"{case.title}: {reason}")
        if reason is not None:
            print(f"{case.title}: not timed, {reason}\n", flush=True)
            record.not_timed.append({"title": case.title, "reason": reason})
        record.write()
        if lost is None and not _device_answers():
            lost = f"the device answers no more since {case.title}"
            wrong.append(lost)
    record.is_finished = lost is None
    record.write()
    print(part.units)
    return wrong


def _why_not(case: AnyCase, proof: Proof, deadline: float) -> str | None:
    if (reason := proof.why_red(needs(case))) is not None:
        return f"its tests are not green ({reason})"
    return "the seconds were used up" if time.monotonic() >= deadline else None


def _release_leftovers() -> None:
    """Models in reference cycles, and graphs that torch.compile keeps: the next case may want all
    of the memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _device_answers() -> bool:
    """A kernel that went astray leaves the process without a device."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

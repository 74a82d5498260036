"""The suite's files, read again. No number is let through whose tests were red, or were those of
other sources than were timed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuserl.bench.suite.part import FORMAT
from fuserl.bench.suite.proof import Proof, in_cuda

PARTS = ("ops", "rollouts", "step")
"""In the order in which they are told; the names of their files."""


@dataclass(frozen=True, slots=True)
class Results:
    """Of one part in one folder."""

    part: str
    machine: Mapping[str, Any]
    ceilings: Mapping[str, Any]
    cases: Sequence[Mapping[str, Any]]
    """What may be shown."""
    hidden: Sequence[tuple[str, str]]
    """Titles of the others, each with its reason."""

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        return [case for case in self.cases if case["kind"] == kind]


def result_folders(top: Path) -> list[Path]:
    """Those below `top` that hold files of the suite."""
    return sorted({path.parent for part in PARTS for path in top.glob(f"*/{part}.json")})


def read_folder(folder: Path) -> list[Results]:
    """Its parts. ValueError for a file that is none of the suite's."""
    paths = [folder / f"{part}.json" for part in PARTS]
    return [_read(path) for path in paths if path.exists()]


def _read(path: Path) -> Results:
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT or "proof" not in content:
        raise ValueError(f"{path}: not a file of the GPU suite (format {FORMAT} with its proof)")
    proof, machine = Proof(**content["proof"]), content["machine"]
    others = None
    for name, what in (("sources", "sources"), ("modules", "native modules")):
        if proof.key[name] != machine[name]:
            others = f"its tests were those of other {what} ({proof.key[name]})"
    shown, hidden = [], [(left["title"], left["reason"]) for left in content["not_timed"]]
    for case in content["cases"]:
        reason = others or proof.why_red(case["needs"])
        if reason is None:
            shown.append(_proven(case, proof))
        else:
            hidden.append((case["title"], reason))
    return Results(content["part"], machine, content["ceilings"], shown, hidden)


def _proven(case: Mapping[str, Any], proof: Proof) -> Mapping[str, Any]:
    """Without an implementation in CUDA C++ whose own tests are not green."""
    if case["kind"] != "op" or case["case"]["device"] != "cuda":
        return case
    if proof.why_red([in_cuda(case["case"]["op"])]) is None:
        return case
    kept = [result for result in case["results"] if result["provider"] != "fuserl-native"]
    return {**case, "results": kept}

"""What tests of the GPU suite share: tiny cases on a CPU, proofs, and a record to write."""

from pathlib import Path
from typing import Any

from fuserl.bench.case import Case
from fuserl.bench.decode_steps import StepCase
from fuserl.bench.rl_phases import PhasesCase
from fuserl.bench.suite.part import Record
from fuserl.bench.suite.proof import Proof
from fuserl.bench.timing import Ceilings

CEILINGS = Ceilings(1e9, 1e9, "bf16", 0.002)
KEY = {
    "sources": "abc",
    "modules": {"_native.so": "def"},
    "device": "a GPU",
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
}
MACHINE = {**KEY, "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "threads": 1}
ROWS = Case(
    op="token_logprobs",
    pass_name="forward",
    device="cpu",
    dtype="fp32",
    num_rows=12,
    vocab_size=37,
)
STEPS = StepCase(
    model="tiny", num_rows=2, prompt_length=4, contexts=(4, 8), dtype="fp32", device="cpu"
)


PHASES = PhasesCase(
    model="tiny",
    algorithm="grpo",
    num_prompts=2,
    num_samples=2,
    prompt_length=4,
    max_new_tokens=3,
    dtype="fp32",
    device="cpu",
)


def proof(*green: str, **changes: Any) -> Proof:
    """A whole one; red and other fields by keyword."""
    fields: dict[str, Any] = {"red": {}, **changes}
    return Proof(KEY, True, True, dict.fromkeys(green, 3), **fields)


def record(folder: Path, part: str, found: Proof, **machine: Any) -> Record:
    return Record(folder / f"{part}.json", part, {**MACHINE, **machine}, CEILINGS, found)

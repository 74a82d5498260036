"""What the phases of a step of RL took, beside what they must take: records, table and JSON.

`fuserl profile` and the benchmark of whole steps (rl_phases.py) share them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from fuserl.bench.memory import peak_bytes, reset_peak, why_not_measured
from fuserl.bench.output import table_row
from fuserl.bench.phase_costs import PhaseCosts
from fuserl.bench.timing import Ceilings, as_milliseconds, quartiles
from fuserl.stages.rl_metrics import PHASES, Clock

WHOLE = "step"
UNITS = """\
ms: of the phase, with several steps median [quartiles]. tokens/s: of the completions. FLOP:
products and attention as model/flops.py counts them, without what activation checkpointing computes
again. limit: the time below which no implementation gets (bench/phase_costs.py), and its share of
the time taken; a model that stays in the processor's cache can pass 100 %. MFU: flops over time and
the measured rate of products. peak: most memory in use during the phase, on a GPU what torch
allocated, on a CPU what was resident."""


class PhaseClock(Clock):
    """A Clock that also tells the most memory in use in each phase.

    On a CPU looking at it disturbs the times: such a step is for memory alone."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self._is_measured = why_not_measured(device) is None
        self.peak_bytes: dict[str, int] = {}

    @contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        if self._is_measured:
            reset_peak(self._device)
        with super().lap(phase):
            yield
        if self._is_measured:
            self.peak_bytes[phase] = peak_bytes(self._device)


@dataclass(slots=True)
class PhaseResult:
    """Of one phase, or of the whole step."""

    name: str
    num_tokens: int
    """Of the completions of a step."""
    num_flops: int | None
    """None where they are not known."""
    limit_seconds: float | None
    """None where it is not known: a Python function's time is its own."""
    peak_bytes: int | None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return quartiles(self.seconds)[1]

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.median

    @property
    def share_of_limit(self) -> float | None:
        return None if self.limit_seconds is None else self.limit_seconds / self.median

    def mfu(self, ceilings: Ceilings) -> float | None:
        if self.num_flops is None:
            return None
        return self.num_flops / self.median / ceilings.flops_per_second

    def to_json(self, ceilings: Ceilings) -> dict[str, Any]:
        low, median, high = quartiles(self.seconds)
        return asdict(self) | {
            "median_seconds": median,
            "quartiles_seconds": [low, high],
            "tokens_per_second": self.tokens_per_second,
            "share_of_limit": self.share_of_limit,
            "mfu": self.mfu(ceilings),
        }


def phase_results(
    steps: Sequence[Mapping[str, float]],
    costs: PhaseCosts | None,
    num_tokens: int,
    peaks: Mapping[str, int],
    ceilings: Ceilings,
) -> list[PhaseResult]:
    """The phases in their order, then the whole step.

    steps: seconds by phase of each timed step. num_tokens: of the completions of a step."""
    found = []
    for phase in (phase for phase in PHASES if phase in steps[0]):
        parts = None if costs is None else costs[phase]
        found.append(
            PhaseResult(
                phase,
                num_tokens,
                None if parts is None else sum(cost.num_flops for cost in parts),
                sum(map(ceilings.floor_ms, parts)) / 1e3 if parts else None,
                peaks.get(phase),
                [step[phase] for step in steps],
            )
        )
    whole = PhaseResult(
        WHOLE,
        num_tokens,
        None if costs is None else sum(phase.num_flops or 0 for phase in found),
        None if costs is None else sum(phase.limit_seconds or 0 for phase in found),
        max(peaks.values(), default=None),
        [sum(step.values()) for step in steps],
    )
    return [*found, whole]


def phase_table(results: Sequence[PhaseResult], ceilings: Ceilings) -> str:
    """In Markdown."""
    heads = ("phase", "ms", "tokens/s", "FLOP", "limit ms", "limit", "MFU", "peak GB")
    lines = [table_row(*heads), table_row(":--", *["--:"] * (len(heads) - 1))]
    for result in results:
        low, median, high = (as_milliseconds(1e3 * s) for s in quartiles(result.seconds))
        spread = f" [{low}, {high}]" if len(result.seconds) > 1 else ""
        flops, limit, share = result.num_flops, result.limit_seconds, result.share_of_limit
        mfu, peak = result.mfu(ceilings), result.peak_bytes
        lines.append(
            table_row(
                result.name,
                f"{median}{spread}",
                f"{result.tokens_per_second:,.0f}",
                _with_prefix(flops) if flops else "-",
                "-" if limit is None else as_milliseconds(1e3 * limit),
                "-" if share is None else _percent(share),
                _percent(mfu) if mfu else "-",
                "-" if peak is None else f"{peak / 1e9:.2f}",
            )
        )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _with_prefix(value: float) -> str:
    """Four digits, as in 12.34T."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g}{prefix}"
    return f"{value:.4g}"

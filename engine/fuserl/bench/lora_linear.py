"""A product with low-rank adapters, forward and backward: `fuserl bench lora_linear`.

Ours is LoRALinear; PEFT's is its Linear (one for each of query, key and value, as a model of
transformers has them) with fp32 adapters, as PEFT trains them; `torch` is the formula, plainly. The
product alone, without adapters, is the floor. The weight is frozen; the input gets a gradient.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuserl.bench.case import DTYPES
from fuserl.bench.checking import OURS_MORE, RIVAL_BOUND
from fuserl.bench.memory import peak_extra_bytes, why_not_measured
from fuserl.bench.output import WrongAnswer, refuse_other_options, run_cases, table_row
from fuserl.bench.rivals import Unavailable, load
from fuserl.bench.timing import as_milliseconds, interleave, quartiles
from fuserl.bench.truth import Error, finite_norm
from fuserl.config import BenchConfig
from fuserl.device import default_device
from fuserl.model.lora_linear import LoRALinear, Segment

NAME = "lora_linear"
OURS, BASELINE, FLOOR = "fuserl", "peft", "no adapter"
_OPTIONS = {
    *("op", "device", "dtype", "num_rows", "hidden_size"),
    *("rounds", "budget_seconds", "threads", "json"),
}
_UNITS = """\
ms: median [quartiles] of interleaved rounds of one forward and backward. vs peft: its median over
this one. peak: most memory during it. errors against float64: absolute of the output, relative
(2-norm, the worst of input, A and B) of the gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraCase:
    dtype: str
    device: str
    num_parts: int  # 1: a product [D, D]; 3: query, key and value of it, adapters on each
    num_rows: int = 2048
    hidden_size: int = 512
    rank: int = 16

    @property
    def title(self) -> str:
        sizes = f"N={self.num_rows}, D={self.hidden_size}, out={self.num_parts * self.hidden_size}"
        return f"{NAME} {self.dtype} {sizes}, rank {self.rank}"


class Problem:
    """One case: weights, input, the output's gradient, and the truth in float64."""

    def __init__(self, case: LoraCase) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        size, rank, parts = case.hidden_size, case.rank, case.num_parts
        place: dict[str, Any] = {"device": case.device, "dtype": DTYPES[case.dtype]}
        self.weight = (draw(parts * size, size) * size**-0.5).to(**place)
        self.x = draw(case.num_rows, size).to(**place)
        self.y_grad = draw(case.num_rows, parts * size).to(**place)
        self.a = [(draw(rank, size) * size**-0.5).to(case.device) for _ in range(parts)]
        self.b = [(draw(size, rank) * 0.1).to(case.device) for _ in range(parts)]
        self.scale = 2.0
        (x,), a, b = (
            [tensor.double().requires_grad_() for tensor in given]
            for given in ([self.x], self.a, self.b)
        )
        y = formula(x, self.weight.double(), a, b, self.scale)
        self.gradients = torch.autograd.grad(y, [x, *a, *b], self.y_grad.double())
        self.output = y.detach()

    def error(self, answer: tuple[Tensor, ...]) -> Error:
        """answer: the output, then the gradients of x, every A and every B, where there are any."""
        output, *gradients = answer
        slopes = [
            finite_norm(mine, (mine.double() - exact) / exact.norm(), 2)
            for mine, exact in zip(gradients, self.gradients, strict=True)
        ]
        return Error(finite_norm(output, output.double() - self.output), max(slopes))


def formula(x: Tensor, weight: Tensor, a: list[Tensor], b: list[Tensor], scale: float) -> Tensor:
    added = [scale * F.linear(F.linear(x, a_s), b_s) for a_s, b_s in zip(a, b, strict=True)]
    return F.linear(x, weight) + torch.cat(added, dim=-1)


class Call:
    """One provider: a function of the input, and the parameters that train."""

    def __init__(
        self, problem: Problem, function: Callable[[Tensor], Tensor], trained: list[Tensor]
    ) -> None:
        self._x = problem.x.clone().requires_grad_()
        self._y_grad, self._function, self._trained = problem.y_grad, function, trained

    def prepare(self) -> None:
        pass

    def run(self) -> tuple[Tensor, ...]:
        y = self._function(self._x)
        return (y.detach(), *torch.autograd.grad(y, [self._x, *self._trained], self._y_grad))


def _ours(problem: Problem) -> Call:
    size, rank, parts = problem.case.hidden_size, problem.case.rank, problem.case.num_parts
    linear = nn.Linear(size, parts * size, bias=False, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    alpha = problem.scale * rank
    layer = LoRALinear(
        linear,
        [Segment(f"part {i}", i * size, (i + 1) * size, rank, alpha) for i in range(parts)],
    )
    with torch.no_grad():
        layer.lora_a.copy_(torch.cat(problem.a))
        for mine, given in zip(layer.lora_b, problem.b, strict=True):
            mine.copy_(given)
    return _Stacked(problem, layer, [layer.lora_a, *layer.lora_b])


class _Stacked(Call):
    """Ours holds every A in one matrix."""

    def run(self) -> tuple[Tensor, ...]:
        y, x_grad, a_grad, *b_grads = super().run()
        return y, x_grad, *a_grad.chunk(len(b_grads)), *b_grads


def _peft(problem: Problem) -> Call:
    linear_class = load("peft.tuners.lora.layer", "Linear")
    rank = problem.case.rank
    settings = load("peft", "LoraConfig")(r=rank, lora_alpha=problem.scale * rank)
    parts = []
    for weight, a, b in zip(
        problem.weight.chunk(problem.case.num_parts), problem.a, problem.b, strict=True
    ):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        part = linear_class(linear, "default", settings, r=rank, lora_alpha=problem.scale * rank)
        part.lora_A["default"].weight = nn.Parameter(a.clone())
        part.lora_B["default"].weight = nn.Parameter(b.clone())
        parts.append(part)

    def function(x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in parts], dim=-1) if len(parts) > 1 else parts[0](x)

    trained = [getattr(p, side)["default"].weight for side in ("lora_A", "lora_B") for p in parts]
    return Call(problem, function, trained)


def _torch(problem: Problem) -> Call:
    dtype = problem.weight.dtype
    a, b = ([t.to(dtype).requires_grad_() for t in given] for given in (problem.a, problem.b))
    function = partial(formula, weight=problem.weight, a=a, b=b, scale=problem.scale)
    return Call(problem, function, [*a, *b])


def _floor(problem: Problem) -> Call:
    return Call(problem, partial(F.linear, weight=problem.weight), [])


_PROVIDERS = {OURS: _ours, BASELINE: _peft, "torch": _torch, FLOOR: _floor}


@dataclass(slots=True)
class LoraResult:
    """One provider in one case."""

    provider: str
    error: Error | None  # None: of the floor, which computes another thing
    peak_extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return quartiles(self.samples_ms)[1]


@dataclass(frozen=True, slots=True)
class LoraReport:
    case: LoraCase
    results: list[LoraResult]

    def speedup(self, result: LoraResult) -> float:
        """Times as fast as PEFT."""
        (baseline,) = [r for r in self.results if r.provider == BASELINE]
        return baseline.median_ms / result.median_ms

    def table(self) -> str:
        """In Markdown."""
        heads = ("", "ms", f"vs {BASELINE}", "peak MB", "error of output", "of gradients")
        lines = [
            f"{self.case.title}\n",
            table_row(*heads),
            table_row("---", *["--:"] * (len(heads) - 1)),
        ]
        for result in sorted(self.results, key=lambda r: r.median_ms):
            low, median, high = quartiles(result.samples_ms)
            peak, error = result.peak_extra_bytes, result.error
            lines.append(
                table_row(
                    result.provider,
                    "{} [{}, {}]".format(*map(as_milliseconds, (median, low, high))),
                    f"{self.speedup(result):.2f}x",
                    "-" if peak is None else f"{peak / 1e6:.1f}",
                    "-" if error is None else f"{error.value:.1e}",
                    "-" if error is None else f"{error.gradient:.1e}",
                )
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        results = [
            asdict(r)
            | {
                "median_ms": r.median_ms,
                "quartiles_ms": list(quartiles(r.samples_ms)[::2]),
                "speedup": self.speedup(r),
            }
            for r in self.results
        ]
        return asdict(self) | {"results": results}


def run_lora_linear(config: BenchConfig) -> list[LoraReport]:
    """Print the tables and write the JSON that was asked for.

    Raises ValueError for an option that would do nothing and without PEFT, and WrongAnswer.
    """
    try:
        return run_cases(config, cases_of(config), run_case, _UNITS)
    except Unavailable as reason:
        raise ValueError(f"{NAME} is measured against PEFT, and {reason}") from None


def cases_of(config: BenchConfig) -> list[LoraCase]:
    refuse_other_options(config, _OPTIONS, NAME)
    if config.dtype == "fp16":
        raise ValueError(f"dtype of {NAME} must be fp32 or bf16, not 'fp16'")
    device = default_device(None if config.device == "auto" else config.device).type
    return [
        LoraCase(
            dtype=dtype,
            device=device,
            num_parts=num_parts,
            num_rows=config.num_rows or 2048,
            hidden_size=size,
            rank=rank,
        )
        for dtype in (("fp32", "bf16") if config.dtype == "auto" else (config.dtype,))
        for size in ((512, 1024) if config.hidden_size is None else (config.hidden_size,))
        for rank in (8, 16)
        for num_parts in (1, 3)
    ]


def run_case(case: LoraCase, rounds: int, budget_seconds: float) -> LoraReport:
    """Check every provider's output and gradients, then time them, interleaved."""
    problem = Problem(case)
    calls = {name: make(problem) for name, make in _PROVIDERS.items()}
    results = {}
    for name, call in calls.items():
        answer = call.run()
        results[name] = LoraResult(name, None if name == FLOOR else problem.error(answer))
    _refuse_wrong(case, results)
    if why_not_measured(case.device) is None:
        for name, call in calls.items():
            results[name].peak_extra_bytes = peak_extra_bytes(case.device, call.run)
    for name, samples in interleave(case.device, calls, rounds, budget_seconds).items():
        results[name].samples_ms = samples
    return LoraReport(case, list(results.values()))


def _refuse_wrong(case: LoraCase, results: dict[str, LoraResult]) -> None:
    """Rivals may err as the dtype does, ours no more than torch in the same dtype and a little."""
    more, plain = OURS_MORE[case.dtype], results["torch"].error
    assert plain is not None
    bounds = dict.fromkeys(results, RIVAL_BOUND[case.dtype])
    bounds[OURS] = Error(plain.value + more.value, plain.gradient + more.gradient)
    wrong = [
        f"{name} errs by {result.error.value:.1e} (gradients {result.error.gradient:.1e})"
        for name, result in results.items()
        if result.error is not None and not result.error.within(bounds[name])
    ]
    if wrong:
        raise WrongAnswer(f"{case.title}: nothing was timed, because {'; '.join(wrong)}")

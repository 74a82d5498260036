"""Times of calls in turn, and the two ceilings of the device."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

import fuserl_kernels as fk
from fuserl.bench.case import DTYPES, Cost
from fuserl.bench.checking import Call
from fuserl.bench.rivals import Unavailable
from fuserl.bench.truth import Tensors

MIN_ROUNDS = 3
_FLUSH_BYTES = 256 << 20  # several times any L2 cache
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_WALL_MS = 100.0  # of calls in a row
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


class Stopwatch:
    """Milliseconds of one function: events on a CUDA device (with a cold L2), else wall time."""

    def __init__(self, device: str) -> None:
        self._flush = None
        if device == "cuda":
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        if self._flush is None:
            began = time.perf_counter()
            result = run()
            ended = time.perf_counter()
            del result  # giving memory back is not timed
            return 1e3 * (ended - began)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


class Timed(Protocol):
    """prepare() makes what a run uses up and is never timed."""

    def prepare(self) -> None: ...

    def run(self) -> object: ...


def interleave(
    device: str, calls: Mapping[str, Timed], rounds: int, budget_seconds: float
) -> dict[str, list[float]]:
    """Samples in milliseconds: A B C A B C ..., until `rounds` or the budget are used up.

    There are MIN_ROUNDS at least, whatever the budget.
    """
    stopwatch = Stopwatch(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + budget_seconds
    gc.collect()
    gc.disable()
    try:
        for finished in range(max(rounds, MIN_ROUNDS)):
            if finished >= MIN_ROUNDS and time.perf_counter() > deadline:
                break
            for name, call in calls.items():
                call.prepare()
                samples[name].append(stopwatch(call.run))
    finally:
        gc.enable()
    return samples


class Replay(Call):
    """A call captured as a CUDA graph: its time is the device's, without the host's part.

    Raises Unavailable for a call that cannot be captured, such as one that waits for the device.
    """

    _WARM_UPS = 3

    def __init__(self, call: Call) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self._WARM_UPS):
                call.run()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph):
                self._answer = call.run()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise Unavailable(f"it cannot be captured as a CUDA graph ({reason})") from None

    def prepare(self) -> None:
        """A graph reads the inputs where they lay when it was captured."""

    def run(self) -> tuple[Tensors, Tensors]:
        self._graph.replay()
        return self._answer


def wall_ms(call: Call, about_ms: float) -> float:
    """Of one of many calls in a row, host and device together, on a CUDA device."""
    num_calls = max(1, min(100, round(_WALL_MS / about_ms)))
    call.run()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(num_calls):
        call.run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / num_calls


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured: a large copy (bytes read and written), a square matrix product of random data (on a
    CPU torch's or the compiled one in a fixed order, whichever is faster: on some processors the
    second is by far), and on a CUDA device one launch of a kernel that does next to nothing."""

    bytes_per_second: float
    flops_per_second: float
    matmul_dtype: str
    launch_ms: float = 0.0

    def floor_ms(self, cost: Cost) -> float:
        """The time below which no implementation gets on this device."""
        moving = cost.num_bytes / self.bytes_per_second
        return max(1e3 * max(moving, cost.num_flops / self.flops_per_second), self.launch_ms)

    def better_of(self, other: "Ceilings") -> "Ceilings":
        """Of two measurements of one device: what disturbs one only lowers it."""
        return Ceilings(
            max(self.bytes_per_second, other.bytes_per_second),
            max(self.flops_per_second, other.flops_per_second),
            self.matmul_dtype,
            min(self.launch_ms, other.launch_ms),
        )

    def __str__(self) -> str:
        launch = f", launch {1e3 * self.launch_ms:.1f} us" if self.launch_ms else ""
        return (
            f"copy {self.bytes_per_second / 1e9:.1f} GB/s (read + written), "
            f"{self.matmul_dtype} matmul {self.flops_per_second / 1e12:.3g} TFLOP/s{launch}"
        )


def measure_ceilings(device: str, dtype: str) -> Ceilings:
    stopwatch = Stopwatch(device)
    source = torch.ones(_COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    copy_ms = _best(stopwatch, lambda: target.copy_(source))
    size = _MATMUL_SIZE[device]
    a, b = torch.randn(2, size, size, device=device).to(DTYPES[dtype])
    out = torch.empty_like(a)
    matmul_ms = _best(stopwatch, lambda: torch.mm(a, b, out=out))
    if device == "cpu" and dtype != "fp16":
        matmul_ms = min(matmul_ms, _best(stopwatch, lambda: fk.fixed_linear(a, b)))
    launch_ms = _best(stopwatch, lambda: source[:1].zero_()) if device == "cuda" else 0.0
    return Ceilings(
        2 * source.nbytes / copy_ms * 1e3, 2 * size**3 / matmul_ms * 1e3, dtype, launch_ms
    )


def _best(stopwatch: Stopwatch, run: Callable[[], object]) -> float:
    """A ceiling is the fastest of its samples: whatever disturbs one only slows it."""
    run()
    return min(stopwatch(run) for _ in range(20))


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, interpolated."""
    low, middle, high = torch.quantile(
        torch.tensor(samples, dtype=torch.float64), torch.tensor([0.25, 0.5, 0.75]).double()
    ).tolist()
    return low, middle, high


def as_milliseconds(value: float) -> str:
    """Four digits, and never an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"

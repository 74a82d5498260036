"""What one benchmark asks, and what it must cost at least."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "forward_backward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One op at one size, dtype and pass."""

    op: str
    pass_name: str
    """One of PASSES."""
    device: str
    dtype: str
    """A key of DTYPES."""
    num_rows: int
    vocab_size: int
    hidden_size: int
    """0 for an op on logits."""
    with_entropy: bool = False
    inplace_grad: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def backward(self) -> bool:
        return self.pass_name == "forward_backward"

    @property
    def title(self) -> str:
        hidden = f"D={self.hidden_size} " if self.hidden_size else ""
        extras = [" with entropy"] * self.with_entropy + [" in-place gradient"] * self.inplace_grad
        return (
            f"{self.op} {self.pass_name} N={self.num_rows} {hidden}V={self.vocab_size} "
            f"{self.dtype} {self.device}{''.join(extras)}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that any implementation moves and multiplies."""

    num_bytes: int
    num_flops: int

    def floor_ms(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The time below which no implementation gets on a device with these ceilings."""
        return 1e3 * max(self.num_bytes / bytes_per_second, self.num_flops / flops_per_second)


def rows_cost(case: Case) -> Cost:
    """Of rows of logits [N, V]: one read; and in a separate backward one read and one write.

    A gradient in place saves memory, not traffic.
    """
    passes = 3 if case.backward else 1
    return Cost(passes * case.num_rows * case.vocab_size * case.torch_dtype.itemsize, 0)


def linear_cost(case: Case) -> Cost:
    """Of hidden [N, D] x weight [V, D]: 2NDV flops for the logits and as many for each gradient.

    Each input is read once and each gradient written once; the logits need never leave the chip.
    """
    n, d, v = case.num_rows, case.hidden_size, case.vocab_size
    passes = 2 if case.backward else 1
    return Cost(passes * (n + v) * d * case.torch_dtype.itemsize, (2 * passes - 1) * 2 * n * d * v)

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
    # Sizes are 0 for an op that has no such dimension.
    num_rows: int = 0
    """N: tokens, sampled rows or pairs."""
    vocab_size: int = 0
    hidden_size: int = 0
    num_sequences: int = 0
    """B of an op on [B, T]."""
    num_slots: int = 0
    """T of an op on [B, T]."""
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_tokens: int = 0
    """Capacity of a cache."""
    with_entropy: bool = False
    inplace_grad: bool = False
    with_metrics: bool = False
    with_residual: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    cuda_graph: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def backward(self) -> bool:
        return self.pass_name == "forward_backward"

    @property
    def title(self) -> str:
        sizes = {
            "N": self.num_rows,
            "B": self.num_sequences,
            "T": self.num_slots,
            "D": self.hidden_size,
            "V": self.vocab_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "tokens": self.num_tokens,
        }
        extras = {
            "with entropy": self.with_entropy,
            "in-place gradient": self.inplace_grad,
            "with metrics": self.with_metrics,
            "with residual": self.with_residual,
            f"temperature {self.temperature:g}": self.temperature != 1,
            f"top-p {self.top_p:g}": self.top_p != 1,
            "graph replay": self.cuda_graph,
        }
        words = [self.op, self.pass_name]
        words += [f"{letter}={size}" for letter, size in sizes.items() if size]
        words += [self.dtype, self.device, *(word for word, is_on in extras.items() if is_on)]
        return " ".join(words)

    @property
    def lengths(self) -> list[int]:
        """Trained tokens of each of the B sequences: evenly from half of T to all of it."""
        num_slots, steps = self.num_slots, max(1, self.num_sequences - 1)
        spare = num_slots - -(-num_slots // 2)
        return [num_slots - spare * i // steps for i in range(self.num_sequences)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cost:
    """The least that any implementation moves and multiplies."""

    num_bytes: int
    num_flops: int


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

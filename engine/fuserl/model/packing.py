"""How sequences lie end to end in one row of tokens, with no padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


def rows_and_offsets(
    lengths: Sequence[int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The sequence of each token and its place in it, [N] int64 each, of sequences packed end to
    end; a length may be 0."""
    starts = torch.tensor([0, *accumulate(lengths)], device=device)
    rows = torch.arange(len(lengths), device=device).repeat_interleave(
        torch.tensor(lengths, device=device), output_size=sum(lengths)
    )
    return rows, torch.arange(sum(lengths), device=device) - starts[rows]


@dataclass(frozen=True, slots=True)
class Packing:
    """B sequences of N tokens in all. The lengths are known on the host: nothing waits for the
    device to learn a shape."""

    lengths: tuple[int, ...]  # B, each at least 1
    cu_seqlens: Tensor  # [B + 1] int32: where each sequence starts, and N
    positions: Tensor  # [N] int64: of each token in its sequence
    rows: Tensor  # [N] int64: the sequence of each token
    prompt_lengths: tuple[int, ...] | None = None  # B: where completions begin, if that is known

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        prompt_lengths: Sequence[int] | None = None,
    ) -> "Packing":
        """Raises ValueError where a sequence has no token."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths must be positive, and at least one, got {list(lengths)}")
        rows, positions = rows_and_offsets(lengths, device)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        begin = None if prompt_lengths is None else tuple(prompt_lengths)
        return cls(tuple(lengths), cu_seqlens, positions, rows, begin)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def starts(self) -> Tensor:
        """[B] int64: the index of each sequence's first token."""
        return self.cu_seqlens[:-1].long()

    @property
    def last(self) -> Tensor:
        """[B] int64: the index of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    @property
    def device(self) -> torch.device:
        return self.positions.device

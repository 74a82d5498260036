"""Sums over sequences and back, for padded [B, T] and packed [N] tensors, and the dtype rule."""

import torch


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def sequence_ids(num_tokens: int, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Number of the sequence each packed token belongs to: int64 [N]."""
    positions = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:], right=True)


def sequence_sum(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """[B, T] or packed [N] -> [B]."""
    if cu_seqlens is None:
        return x.sum(-1)
    sums = x.new_zeros(cu_seqlens.shape[0] - 1)
    return sums.index_add_(0, sequence_ids(x.shape[0], cu_seqlens), x)


def spread(
    per_sequence: torch.Tensor, like: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """[B] -> [B, T] or packed [N]: each token gets its sequence's number."""
    if cu_seqlens is None:
        return per_sequence.unsqueeze(-1).expand_as(like)
    return per_sequence[sequence_ids(like.shape[0], cu_seqlens)]


def pad(packed: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed [N] -> (zero-padded [B, longest], slot of each packed token in it flattened [N])."""
    num_sequences = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if num_sequences else 0
    ids = sequence_ids(packed.shape[0], cu_seqlens)
    positions = torch.arange(packed.shape[0], device=packed.device)
    slots = ids * longest + positions - cu_seqlens[ids].long()
    padded = packed.new_zeros(num_sequences * longest)
    padded[slots] = packed
    return padded.view(num_sequences, longest), slots

"""Rotary frequencies of each kind, and the tables of cosines and sines made from them."""

import math

import torch
from torch import Tensor

from fuserl.model.config import Rope, RopeScaling


class RotaryTable:
    """cos and sin of position times frequency, [positions, dim / 2] fp32 each, made once for as
    many positions as were asked for so far.

    Angles are products in fp32, as transformers makes them: checkpoints were trained so.
    """

    def __init__(self, rope: Rope | None, head_dim: int) -> None:
        self._rope = rope
        self._dim = 0 if rope is None else head_dim if rope.dim is None else rope.dim
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def interleaved(self) -> bool:
        return self._rope is not None and self._rope.interleaved

    def upto(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of at least the first num_positions positions."""
        have = self._tables.get(device)
        if have is None or len(have[0]) < num_positions:
            # Doubling: a rollout that grows by a token a time makes few tables.
            size = max(num_positions, 2 * len(have[0]) if have else 256)
            with torch.inference_mode(False), torch.no_grad():
                have = self._make(size, device)
            self._tables[device] = have
        return have

    def _make(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._rope is None:
            empty = torch.empty(num_positions, 0, device=device)
            return empty, empty
        frequencies, factor = frequencies_of(self._rope, self._dim)
        positions = torch.arange(num_positions, device=device, dtype=torch.float32)
        angles = positions[:, None] * frequencies.to(device)
        return angles.cos() * factor, angles.sin() * factor


def frequencies_of(rope: Rope, dim: int) -> tuple[Tensor, float]:
    """Radians a position, [dim / 2] fp32, and the factor on cosines and sines."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    frequencies = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, rope, scaling, dim)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Wavelengths past original / low_freq_factor are stretched, those under original /
    high_freq_factor kept, and those between blended linearly in original / wavelength."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Tensor, rope: Rope, scaling: RopeScaling, dim: int) -> tuple[Tensor, float]:
    """Dimensions that turn less than beta_slow times in the original length are stretched, those
    that turn more than beta_fast times kept, and those between blended by their number."""

    def dimension(turns: float) -> float:
        length = scaling.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = torch.arange(dim // 2, dtype=torch.float32) - low
    stretched = (ramp / max(high - low, 1e-3)).clamp(0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return (1 - stretched) * frequencies + stretched * frequencies / scaling.factor, factor

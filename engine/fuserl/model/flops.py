"""Floating-point operations of a decoder, and what a hydra saves of them. Products and attention
count, two a multiply-add; norms, activations and look-ups do not. A backward pass through what
trains costs twice its forward pass, and nothing below the lowest layer that trains."""

from collections.abc import Sequence
from dataclasses import dataclass

from fuserl.model.config import DecoderConfig


def layers_flops(config: DecoderConfig, start: int, stop: int, lengths: Sequence[int]) -> int:
    """One forward pass over sequences of these lengths through layers start to stop - 1."""
    hidden, inner, num_tokens = config.hidden_size, config.intermediate_size, sum(lengths)
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    products = hidden * (2 * heads + 2 * kv_heads)
    products += (3 if config.gated_mlp else 2) * hidden * inner
    flops = 0
    for layer in range(start, stop):
        window = config.window_of(layer)
        pairs = sum(_visible_pairs(length, window) for length in lengths)
        flops += 2 * products * num_tokens + 4 * heads * pairs
    return flops


def _visible_pairs(length: int, window: int | None) -> int:
    """Of a query and a key that it sees."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFlops:
    """Scoring (reference and critic, not the reward model) and update of one step of RL."""

    naive: int  # policy, reference and critic as whole models, their lower layers frozen
    hydra: int

    @property
    def saved_share(self) -> float:
        return 1 - self.hydra / self.naive


def step_flops(
    config: DecoderConfig,
    lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    depth: int,
    scored: Sequence[bool],
    updated: Sequence[bool],
    passes: int,
    head_trains: bool,
) -> StepFlops:
    """lengths, completion_lengths: B tokens each, of whole sequences and of their completions.
    depth: layers that are frozen. scored, updated: one entry for each decoder that runs over the
    batch in scoring and in each of `passes` passes of the update: whether it starts from the kept
    stream. head_trains: the vocabulary head, which reference and policy have.

    With L(i, j) the layers and H the head, naive = scored L(0, n) + H + passes (updated (L(0, n) +
    2 L(depth, n)) + H (2 + head_trains)). A hydra saves L(0, depth) wherever a decoder starts from
    the kept stream, and pays for the way of each last token, which no rollout reads, through it.
    """
    whole = layers_flops(config, 0, config.num_layers, lengths)
    lower = layers_flops(config, 0, depth, lengths)
    head = 2 * config.hidden_size * config.vocab_size * sum(completion_lengths)
    naive = len(scored) * whole + head
    naive += passes * (len(updated) * (whole + 2 * (whole - lower)) + head * (2 + head_trains))
    last = lower - layers_flops(config, 0, depth, [length - 1 for length in lengths])
    saved = (sum(scored) + passes * sum(updated)) * lower - last
    return StepFlops(naive=naive, hydra=naive - saved)

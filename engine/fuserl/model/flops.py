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


@dataclass(frozen=True, slots=True)
class Pass:
    """A decoder that runs over the whole batch."""

    config: DecoderConfig
    depth: int  # of its lowest layers that are frozen
    from_kept: bool = False  # starts above them, from the stream that the rollout kept


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Of scoring (reference and critic, not the reward model) and update in one step of RL."""

    naive: int  # every decoder runs whole, its lowest layers frozen
    hydra: int

    @property
    def saved_share(self) -> float:
        return 1 - self.hydra / self.naive


def step_flops(
    lengths: Sequence[int],
    completion_lengths: Sequence[int],
    *,
    scored: Sequence[Pass],
    updated: Sequence[Pass],
    num_epochs: int,
    head_trains: bool,
) -> StepFlops:
    """lengths, completion_lengths: B tokens each, of whole sequences and of their completions.
    scored: what runs in scoring, the reference first. updated: what runs in each of num_epochs
    passes of the update, the policy first. head_trains: the policy's vocabulary head.

    With L(i, j) a decoder's layers and H the vocabulary head's products:
    naive = sum over scored of L(0, n) + H
          + num_epochs (sum over updated of (L(0, n) + 2 L(depth, n)) + H (2 + head_trains))
    A hydra saves L(0, depth) wherever a decoder starts from the kept stream, and pays for the way
    of each sequence's last token, which sampling does not read, through the frozen layers.
    """

    def layers(one: Pass, start: int, stop: int) -> int:
        return layers_flops(one.config, start, stop, lengths)

    def saved(passes: Sequence[Pass]) -> int:
        return sum(layers(one, 0, one.depth) for one in passes if one.from_kept)

    config, depth = scored[0].config, scored[0].depth
    head = 2 * config.hidden_size * config.vocab_size * sum(completion_lengths)
    naive = head + sum(layers(one, 0, one.config.num_layers) for one in scored)
    for one in updated:
        top = layers(one, one.depth, one.config.num_layers)
        naive += num_epochs * (layers(one, 0, one.depth) + 3 * top)
    naive += num_epochs * head * (2 + head_trains)
    without_last = layers_flops(config, 0, depth, [length - 1 for length in lengths])
    paid = layers(scored[0], 0, depth) - without_last
    return StepFlops(naive, naive - saved(scored) - num_epochs * saved(updated) + paid)

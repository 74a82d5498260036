"""Floating-point operations of decoders in a step of RL, and what a hydra saves of them.

Products and attention count, two a multiply-add; norms, activations and look-ups do not, nor do the
products of low-rank adapters themselves. A backward pass through what trains costs twice its
forward pass (once for products whose weights are frozen under adapters), and nothing below the
lowest layer that trains. What activation checkpointing computes again is not counted: it is the
price of memory, no work that was asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fuserl.model.config import DecoderConfig
from fuserl.model.decoder import Decoder
from fuserl.model.freezing import num_frozen
from fuserl.model.heads import Critic, LanguageModel
from fuserl.model.products import linears


@dataclass(frozen=True, slots=True)
class Lengths:
    """In tokens, of the B sequences of a batch; the num_samples completions of a prompt stand
    together."""

    prompts: Sequence[int]
    completions: Sequence[int]
    num_samples: int = 1

    @property
    def whole(self) -> list[int]:
        pairs = zip(self.prompts, self.completions, strict=True)
        return [prompt + completion for prompt, completion in pairs]


def layer_weights(config: DecoderConfig) -> int:
    """Of the matrices of one layer, biases left out."""
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    inner = (3 if config.gated_mlp else 2) * config.intermediate_size
    return config.hidden_size * (2 * heads + 2 * kv_heads + inner)


def layers_flops(config: DecoderConfig, start: int, stop: int, lengths: Sequence[int]) -> int:
    """One forward pass over sequences of these lengths through layers start to stop - 1."""
    products = 2 * (stop - start) * layer_weights(config) * sum(lengths)
    return products + attention_flops(config, start, stop, lengths)


def attention_flops(config: DecoderConfig, start: int, stop: int, lengths: Sequence[int]) -> int:
    """Of the queries with the keys and of the weights with the values."""
    pairs = sum(
        visible_pairs(length, config.window_of(layer))
        for layer in range(start, stop)
        for length in lengths
    )
    return 4 * config.num_heads * config.head_dim * pairs


def visible_pairs(length: int, window: int | None) -> int:
    """Of a query and a key that it sees, in a sequence."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A decoder and its head that run over the whole batch."""

    config: DecoderConfig
    head: Literal["vocabulary", "linear", "mlp"]
    """vocabulary: over the tokens of the completions. Else a number for every token."""
    depth: int = 0
    """Of its lowest layers that are frozen."""
    from_kept: bool = False
    """Starts above them, from the stream that the rollout kept."""
    has_layers: bool = True
    """False: only the head, on what the pass of another model gave."""
    weights_train: bool = True
    """False: the layers' matrices are frozen under adapters, and give no gradient of their own."""
    head_trains: bool = True

    def forward_flops(self, lengths: Lengths, *, naive: bool = False) -> int:
        """naive: as if it did not start from the kept stream."""
        flops = self._head_flops(lengths)
        if self.has_layers:
            start = 0 if naive else self.start
            flops += layers_flops(self.config, start, self.config.num_layers, lengths.whole)
        return flops

    def backward_flops(self, lengths: Lengths) -> int:
        flops = (1 + self.head_trains) * self._head_flops(lengths)
        if self.has_layers:
            trained = (self.depth, self.config.num_layers, lengths.whole)
            attention = attention_flops(self.config, *trained)
            products = layers_flops(self.config, *trained) - attention
            flops += (1 + self.weights_train) * products + 2 * attention
        return flops

    @property
    def start(self) -> int:
        """The first layer that runs."""
        return self.depth if self.from_kept else 0

    @property
    def num_weights(self) -> int:
        """Of the matrices that it multiplies by."""
        layers = self.config.num_layers - self.start if self.has_layers else 0
        return layers * layer_weights(self.config) + self.head_weights

    @property
    def head_weights(self) -> int:
        hidden = self.config.hidden_size
        wide = 2 * hidden
        sizes = {
            "vocabulary": hidden * self.config.vocab_size,
            "linear": hidden,
            "mlp": hidden * wide + wide,
        }
        return sizes[self.head]

    def _head_flops(self, lengths: Lengths) -> int:
        rows = lengths.completions if self.head == "vocabulary" else lengths.whole
        return 2 * self.head_weights * sum(rows)


def pass_of(model: LanguageModel | Critic) -> Pass:
    """What one pass of a model of our own decoder is."""
    trunk = model.trunk
    assert isinstance(trunk, Decoder)
    head: Literal["vocabulary", "linear", "mlp"]
    if isinstance(model, LanguageModel):
        head, head_trains = "vocabulary", model.output_weight.requires_grad
    else:
        head, head_trains = model.head_kind, True
    return Pass(
        config=trunk.config,
        head=head,
        depth=trunk.shared_layers or num_frozen(trunk),
        from_kept=trunk.shared_layers > 0,
        weights_train=any(linear.weight.requires_grad for linear in linears(trunk)),
        head_trains=head_trains,
    )


def update_passes(policy: LanguageModel, critic: Critic | None) -> list[Pass]:
    """Of one pass of the update over its batch, the policy's first."""
    passes = [pass_of(policy)]
    if critic is not None:
        shares = critic.trunk is policy.trunk
        passes.append(replace(pass_of(critic), has_layers=not shares))
    return passes


@dataclass(frozen=True, slots=True)
class StepFlops:
    """Of scoring (the reward model left out) and update in one step of RL."""

    naive: int  # every decoder runs whole, its lowest layers frozen
    hydra: int

    @property
    def saved_share(self) -> float:
        return 1 - self.hydra / self.naive


def step_flops(
    lengths: Lengths, *, scored: Sequence[Pass], updated: Sequence[Pass], num_epochs: int
) -> StepFlops:
    """scored: what runs in scoring. updated: what runs in each of num_epochs passes of the update,
    the policy first.

    With F a pass's forward and B its backward flops, its head's with them:
    naive = sum over scored of F + num_epochs (sum over updated of (F + B))
    A hydra saves the layers below depth in F wherever a decoder starts from the kept stream, and
    pays for the way of each sequence's last token, which sampling does not read, through them.
    """

    def flops(naive: bool) -> int:
        scoring = sum(one.forward_flops(lengths, naive=naive) for one in scored)
        learning = sum(
            one.forward_flops(lengths, naive=naive) + one.backward_flops(lengths) for one in updated
        )
        return scoring + num_epochs * learning

    return StepFlops(flops(naive=True), flops(naive=False) + last_tokens_flops(updated[0], lengths))


def last_tokens_flops(policy: Pass, lengths: Lengths) -> int:
    """Of each sequence's last token through the policy's frozen layers."""
    whole = lengths.whole
    without = [length - 1 for length in whole]
    return layers_flops(policy.config, 0, policy.depth, whole) - layers_flops(
        policy.config, 0, policy.depth, without
    )


def prefill_flops(config: DecoderConfig, lengths: Lengths) -> int:
    """Of the prompts in a rollout, each computed once for all its samples. No head reads them."""
    return layers_flops(config, 0, config.num_layers, lengths.prompts[:: lengths.num_samples])


def decode_attention_flops(config: DecoderConfig, lengths: Lengths) -> int:
    """Of a rollout's attention behind the prompts: a completion's last token is not computed."""
    read = [length - 1 for length in lengths.whole]
    whole, prompts = (
        attention_flops(config, 0, config.num_layers, part) for part in (read, lengths.prompts)
    )
    return whole - prompts

"""Prompts with their completions, packed end to end, and the one-step shift between the two.

The logits after a token speak of the next one, so a completion token is predicted by the hidden
state of the token before it. That shift is written here (`before`) and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.batch import RolloutBatch
from fuserl.model import hydra
from fuserl.model.decoder import Decoder
from fuserl.model.heads import Critic, LanguageModel, ScalarModel
from fuserl.model.packing import Packing, rows_and_offsets


@dataclass(frozen=True, slots=True)
class Sequences:
    """B sequences of N tokens, M of them in completions. A tensor "by token" has the completion
    tokens' numbers end to end, [M]; "by slot" it is right-padded, [B, T]."""

    token_ids: Tensor  # [N] int64, prompt and completion of each sequence in turn
    packing: Packing
    prompt_lengths: Tensor  # [B] int64
    rows: Tensor  # [M] int64, the sequence of each completion token
    slots: Tensor  # [M] int64, its place in the completion
    trunk_states: Tensor | None = None  # [N, D], of the tokens: see RolloutBatch

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> "Sequences":
        """From lists of token ids, B each; a prompt holds a token at least."""
        joined = [(*prompt, *ids) for prompt, ids in zip(prompts, completions, strict=True)]
        return cls(
            torch.tensor(list(chain.from_iterable(joined)), dtype=torch.int64, device=device),
            Packing.of([len(row) for row in joined], device, [len(prompt) for prompt in prompts]),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
            *rows_and_offsets([len(ids) for ids in completions], device),
        )

    @classmethod
    def of_batch(cls, batch: RolloutBatch) -> "Sequences":
        device = batch.prompts.device
        # One wait for the device; everything after it has sizes the host knows.
        lengths = torch.stack([batch.prompt_lengths, batch.completion_lengths]).tolist()
        packing = Packing.of([p + c for p, c in zip(*lengths, strict=True)], device, lengths[0])
        rows, slots = rows_and_offsets(lengths[1], device)
        prompt_rows, prompt_slots = rows_and_offsets(lengths[0], device)
        token_ids = torch.empty(packing.num_tokens, dtype=torch.int64, device=device)
        starts = packing.starts
        token_ids[starts[prompt_rows] + prompt_slots] = batch.prompts[prompt_rows, prompt_slots]
        first = starts + batch.prompt_lengths
        token_ids[first[rows] + slots] = batch.completions[rows, slots]
        return cls(
            token_ids, packing, batch.prompt_lengths, rows, slots, _trunk_states(batch, packing)
        )

    @property
    def own(self) -> Tensor:
        """[M] int64: where each completion token is among the N."""
        return (self.packing.starts + self.prompt_lengths)[self.rows] + self.slots

    @property
    def before(self) -> Tensor:
        """[M] int64: the token before each completion token, whose state predicts it."""
        return self.own - 1

    @property
    def completion_ids(self) -> Tensor:
        """[M] int64"""
        return self.token_ids[self.own]

    def by_token(self, padded: Tensor) -> Tensor:
        """[B, T] to [M]."""
        return padded[self.rows, self.slots]

    def by_slot(self, packed: Tensor, width: int) -> Tensor:
        """[M] to [B, T], T = width, 0 behind a completion's end."""
        padded = packed.new_zeros(len(self.prompt_lengths), width)
        return padded.index_put((self.rows, self.slots), packed)

    def hidden_states(self, trunk: Decoder) -> Tensor:
        """Of all tokens, after the final norm, [N, D]; a hydra's decoder begins where its shared
        layers end."""
        return hydra.hidden_states(trunk, self.token_ids, self.packing, self.trunk_states)

    def states_by_slot(self, states: Tensor, width: int) -> Tensor:
        """What was known before each completion token, [N] to [B, T], T = width: slot t is the
        token before completion token t. The slot behind a completion's end is its last token;
        those after it repeat that (they are masked wherever they are used)."""
        first = self.packing.starts + self.prompt_lengths - 1
        slots = torch.arange(width, device=states.device)
        where = torch.minimum(first[:, None] + slots, self.packing.last[:, None])
        return states[where]


def _trunk_states(batch: RolloutBatch, packing: Packing) -> Tensor | None:
    """What the batch keeps of its tokens' streams, in the order of the packing."""
    if batch.trunk_states is None or batch.trunk_starts is None:
        return None
    in_completion = packing.positions >= batch.prompt_lengths[packing.rows]
    starts = batch.trunk_starts.clone()
    starts[:, 1] -= batch.prompt_lengths  # so that both are added to a position in the whole row
    return batch.trunk_states[starts[packing.rows, in_completion.long()] + packing.positions]


def mask_of_lengths(lengths: Tensor, width: int) -> Tensor:
    """[B] lengths to a [B, width] bool mask of the slots in use."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def completion_logprobs(
    model: LanguageModel,
    sequences: Sequences,
    temperature: float = 1.0,
    loss_mask: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of the completion tokens, [M] fp32, 0 where loss_mask ([M]) is False.
    Differentiable in the model's parameters."""
    hidden = sequences.hidden_states(model.trunk)
    return fk.linear_token_logprobs(
        hidden.index_select(0, sequences.before),
        model.output_weight,
        sequences.completion_ids,
        bias=model.output_bias,
        softcap=model.config.final_softcap,
        temperature=temperature,
        loss_mask=loss_mask,
    )


def completion_loss(model: LanguageModel, sequences: Sequences) -> Tensor:
    """Mean negative log-likelihood of the completion tokens, 0-d fp32. Its gradients are made with
    it, the logits once: it is the policy loss whose weights (CISPO's clipped ratios) are all 1."""
    token_ids = sequences.completion_ids
    ones = torch.ones_like(token_ids, dtype=torch.float32)
    loss, _ = fk.linear_policy_loss(
        sequences.hidden_states(model.trunk).index_select(0, sequences.before),
        model.output_weight,
        token_ids,
        torch.zeros_like(ones),
        ones,
        torch.ones_like(token_ids, dtype=torch.bool),
        bias=model.output_bias,
        softcap=model.config.final_softcap,
        clip="cispo",
        clip_range=0.0,
    )
    return loss


def completion_values(
    critic: Critic, sequences: Sequences, width: int, hidden: Tensor | None = None
) -> Tensor:
    """The critic's values before each completion token, [B, T] fp32, T = width. hidden: [N, D],
    what its decoder gives, where that is there already."""
    if hidden is None:
        hidden = sequences.hidden_states(critic.trunk)
    return sequences.states_by_slot(critic.head(hidden), width)


def last_values(model: ScalarModel, sequences: Sequences) -> Tensor:
    """The scalar head at each sequence's last token, [B] fp32: the score of the whole."""
    return model(sequences.token_ids, sequences.packing)[sequences.packing.last]

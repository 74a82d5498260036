"""A decoder that this engine lacks: transformers' own module behind the interface of Decoder.

Slower than ours (rows are padded, no fused kernels, one step of Python a layer), and right: what
it gives is what transformers gives. What needs our own layers (frozen layers, hydra, adapters,
activation checkpointing) it does not have, and asking for it is a ValueError.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fuserl.model.config import DecoderConfig
from fuserl.model.fallback_cache import CachedRows, RecomputedRows
from fuserl.model.packing import Packing

Rows = CachedRows | RecomputedRows

FAMILY = "transformers"
"""DecoderConfig.family of these models."""


class TransformersTrunk(nn.Module):
    """module: a base model of transformers (no head), kept in evaluation mode: with dropout, the
    sampler's log-probabilities and the trainer's would be of two policies.

    scale: what hidden states are multiplied by, for architectures that multiply their logits.
    switch_length: sequences longer than this get other rotary frequencies (longrope), which
    transformers chooses for a whole batch; here each sequence gets those of its own length.
    """

    def __init__(
        self,
        config: DecoderConfig,
        module: nn.Module,
        *,
        scale: float = 1.0,
        switch_length: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.module = module.eval()
        self.scale, self.switch_length = scale, switch_length
        self.shared_layers = 0  # as in Decoder; here there are none
        self.has_cache = True
        """Whether transformers' cache of keys and values works for left-padded rows."""
        takes = inspect.signature(module.forward).parameters
        self._takes_positions = "position_ids" in takes

    @property
    def embed_tokens(self) -> nn.Module:
        module: Any = self.module
        return module.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def _embedding(self) -> Tensor:
        return self.embed_tokens.get_parameter("weight")

    @property
    def max_positions(self) -> int:
        return self.config.max_positions

    @property
    def checkpointing(self) -> bool:
        return False

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        if value:
            raise ValueError(
                f"activation_checkpointing needs a family of our own decoder: "
                f"{type(self.module).__name__} runs through transformers"
            )

    def train(self, mode: bool = True) -> "TransformersTrunk":
        """The module's mode does not change: no dropout."""
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TransformersTrunk":
        """What `to` does. Buffers of constants (rotary frequencies) move, but keep their dtype: a
        model of bf16 weights computes with fp32 ones, whichever way it was made."""
        before = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if name in module._non_persistent_buffers_set and buffer is not None
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            moved = module._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        return self

    def forward(self, token_ids: Tensor, packing: Packing) -> Tensor:
        """token_ids: [N] int64, packed. Returns the hidden states after the final norm, [N, D]."""
        if self.switch_length is None:
            return self._padded(token_ids, packing)
        sides = [length > self.switch_length for length in packing.lengths]
        if len(set(sides)) == 1:
            return self._padded(token_ids, packing)
        is_long = torch.tensor(sides, device=packing.device)[packing.rows]
        where, hidden = [], []
        for side in (False, True):
            lengths = [n for n, is_on in zip(packing.lengths, sides, strict=True) if is_on == side]
            tokens = (is_long == side).nonzero().squeeze(1)
            part = Packing.of(lengths, packing.device)
            where.append(tokens)
            hidden.append(self._padded(token_ids[tokens], part))
        return torch.cat(hidden)[torch.cat(where).argsort()]

    def _padded(self, token_ids: Tensor, packing: Packing) -> Tensor:
        """Rows side by side, padded on the right: what is causal never looks there."""
        shape = (len(packing.lengths), packing.max_length)
        padded = token_ids.new_zeros(shape)
        padded[packing.rows, packing.positions] = token_ids
        hidden = self.module(input_ids=padded, use_cache=False).last_hidden_state
        return self.scaled(hidden[packing.rows, packing.positions])

    def scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.scale == 1.0 else hidden * self.scale

    # Decoding

    def new_cache(self, prompts: Packing, prompt_of_row: Tensor, capacity: int) -> Rows:
        """What the rows of a batch have seen; arguments as KVCache's."""
        longest = prompts.max_length + capacity
        switches = self.switch_length is not None and longest > self.switch_length
        kind = CachedRows if self.has_cache and not switches else RecomputedRows
        return kind(prompts, prompt_of_row, capacity)

    def prefill(self, token_ids: Tensor, cache: Rows) -> Tensor:
        """The prompts, [N] packed, into the cache; their hidden states, [N, D]."""
        return cache.prefill(self, token_ids)

    def decode(self, token_ids: Tensor, cache: Rows) -> Tensor:
        """One more token of every row, [B], into the cache; its hidden state, [B, D]."""
        return cache.decode(self, token_ids)

    def extend(
        self, token_ids: Tensor, attention_mask: Tensor, positions: Tensor, past: Any
    ) -> tuple[Tensor, Any]:
        """token_ids, positions: [B, S] new ones; attention_mask: [B, past + S] int64, 1 for a real
        token; past: transformers' cache, or None. Returns hidden states [B, S, D] and the cache."""
        given = {"position_ids": positions} if self._takes_positions else {}
        out = self.module(
            input_ids=token_ids,
            attention_mask=attention_mask,
            past_key_values=past,
            use_cache=True,
            **given,
        )
        return self.scaled(out.last_hidden_state), out.past_key_values

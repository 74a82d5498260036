"""The residual stream of every token of a rollout, kept for the tops of a hydra."""

import torch
from torch import Tensor

from fuserl.model.cache import KVCache
from fuserl.model.decoder import Decoder
from fuserl.model.packing import Packing, rows_and_offsets
from fuserl.model.steps import DecodeStep, PrefillStep, Step


class TrunkKeeper:
    """A decoder, seen by the decode loop, that keeps its stream before layer `depth`.

    While decoding it holds [prompt tokens, D] and [R, capacity, D] of the decoder's dtype:
    beside a cache of all layers, a share of D / (2 num_layers num_kv_heads head_dim).
    """

    def __init__(self, trunk: Decoder, depth: int) -> None:
        self._trunk, self._depth = trunk, depth
        self._prompts = self._completions = torch.empty(0)

    def new_cache(self, prompts: Packing, prompt_of_row: Tensor, capacity: int) -> KVCache:
        self._prompt_of_row = prompt_of_row
        self._completions = torch.empty(
            (len(prompt_of_row), capacity, self._trunk.config.hidden_size),
            dtype=self._trunk.dtype,
            device=prompts.device,
        )
        return self._trunk.new_cache(prompts, prompt_of_row, capacity)

    def prefill(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        step = PrefillStep(cache)
        self._prompts = self._trunk.lower(token_ids, step, self._depth)
        return self._trunk.upper(self._prompts, step, self._depth)

    def decode(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        step = DecodeStep(cache)
        stream = self._keep(token_ids, cache, step)
        hidden = self._trunk.upper(stream, step, self._depth)
        step.advance()
        return hidden

    def finish(
        self, last_token_ids: Tensor, lengths: Tensor, cache: KVCache
    ) -> tuple[Tensor, Tensor]:
        """What was kept, once all R rows have ended. last_token_ids, lengths: [R] int64, of each
        completion; the last token was sampled and never read, so its stream is made here.

        Returns states [tokens, D], the prompts' (each once) and then the completions', end to
        end; and starts [R, 2] int64: where a row's prompt and its completion begin in them.
        """
        cache.prompt_of_row = self._prompt_of_row
        cache.slots = torch.arange(len(lengths), device=lengths.device)
        cache.lengths = lengths - 1
        self._keep(last_token_ids, cache, DecodeStep(cache))
        rows, slots = rows_and_offsets(lengths.tolist(), lengths.device)
        states = torch.cat([self._prompts, self._completions[rows, slots]])
        begins = len(self._prompts) + lengths.cumsum(0) - lengths
        return states, torch.stack([cache.prompts.starts[self._prompt_of_row], begins], dim=1)

    def _keep(self, token_ids: Tensor, cache: KVCache, step: Step) -> Tensor:
        stream = self._trunk.lower(token_ids, step, self._depth)
        self._completions[cache.slots, cache.lengths] = stream
        return stream

"""The rollout of models that run through transformers: its cache holds a batch that can lose rows
but takes none, so all rows of a wave begin together."""

from collections.abc import Sequence

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.model.cache import CacheShape
from fuserl.model.fallback import Rows, TransformersTrunk
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import Packing
from fuserl.rollout.live_rows import Ended, NewPrompt, NewRow
from fuserl.rollout.requests import End
from fuserl.rollout.runner import RunnerOptions, allocate_rows, pack_prompts


class WaveRunner:
    """See Runner."""

    can_refill = False
    weight_bytes = 0
    cache_bytes = 0  # transformers' own, which grows with the rows

    def __init__(self, model: LanguageModel, shape: CacheShape, options: RunnerOptions) -> None:
        assert isinstance(model.trunk, TransformersTrunk)
        self._model, self._trunk, self._options = model, model.trunk, options
        self._capacity = shape.capacity
        self.rows, self.num_flagged = allocate_rows(model, shape), 0
        vocab_size = model.config.vocab_size
        self._is_stop = options.stop.stop_table(vocab_size, model.device)
        self._is_flag = options.stop.flag_table(vocab_size, model.device)
        self._cache: Rows | None = None

    @torch.no_grad()
    def admit(self, prompts: Sequence[NewPrompt], rows: Sequence[NewRow]) -> list[Tensor | None]:
        assert self.rows.num_rows == 0
        device = self._model.device
        token_ids, lengths = pack_prompts(prompts, device)
        packing = Packing.of(lengths, device)
        number = {prompt.item: i for i, prompt in enumerate(prompts)}
        prompt_of_row = torch.tensor([number[row.item] for row in rows], device=device)
        self._cache = self._trunk.new_cache(packing, prompt_of_row, self._capacity)
        hidden = self._trunk.prefill(token_ids, self._cache)
        items = torch.tensor([prompt.item for prompt in prompts], device=device)
        self.rows.prompt_hidden[items] = hidden[packing.last]
        self.rows.start(rows)
        return [None] * len(prompts)

    @torch.no_grad()
    def run(self, max_steps: int, enough: int) -> list[Ended]:
        rows, sampling = self.rows, self._options.sampling
        ended: list[Ended] = []
        self.num_flagged = 0
        for _ in range(max_steps):
            n = rows.num_rows
            slots, lengths = rows.slots[:n], rows.lengths[:n]
            drawn, logprobs, truncated = fk.sample_tokens(
                self._model.logits(rows.hidden[:n]),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=sampling.seed,
                request_ids=rows.request_ids[:n],
                positions=lengths,
            )
            rows.token_ids[slots, lengths] = drawn
            rows.logprobs[slots, lengths] = logprobs.float()
            rows.truncated_logprobs[slots, lengths] = truncated.float()
            token_ids = drawn.clamp(min=0)
            lengths += 1
            end = torch.where(lengths >= rows.limits[:n], int(End.LIMIT), 0)
            if self._is_stop is not None:
                end = torch.where(self._is_stop[token_ids], int(End.STOP), end)
            end = torch.where(drawn < 0, int(End.BROKEN), end)
            if self._is_flag is not None:
                self.num_flagged = int(((end == 0) & self._is_flag[token_ids]).sum())
            found = torch.stack((slots, lengths, end), dim=1).tolist()
            ended += [Ended(slot, length, End(by)) for slot, length, by in found if by]
            if any(by for _, _, by in found):
                stays = (end == 0).nonzero().squeeze(1)
                token_ids = token_ids[stays]
                self.keep(stays)
            if rows.num_rows == 0:
                break
            assert self._cache is not None
            rows.hidden[: rows.num_rows] = self._trunk.decode(token_ids, self._cache)
            if len(ended) >= enough or self.num_flagged:
                break
        return ended

    def keep(self, rows: Tensor) -> None:
        self.rows.keep(rows)
        if self._cache is not None and len(rows):
            self._cache.keep(rows)

    def kept(self, slot: int, length: int) -> Tensor | None:
        return None

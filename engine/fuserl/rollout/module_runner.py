"""The rollout through the decoder's own modules: any device, any family of ours.

A step has fixed shapes and waits for the device nowhere: rows that end are turned off in their
place, and the host looks after a few steps. On CUDA such a step is captured (captured_step.py), and
what the host has seen of it is a look old; on a CPU it runs as it is, with weights packed for
products in a fixed order where they are compiled.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.model.cache import CacheShape, KVCache
from fuserl.model.decoder import Decoder, Layer
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import Packing
from fuserl.model.products import PackedProducts, Product, torch_product
from fuserl.model.steps import DecodeStep, PrefillStep, Step
from fuserl.rollout.captured_step import CapturedSteps
from fuserl.rollout.live_rows import Ended, NewPrompt, NewRow
from fuserl.rollout.polling import Poll
from fuserl.rollout.requests import End
from fuserl.rollout.runner import RunnerOptions, allocate_rows, pack_prompts
from fuserl_kernels import backend, native
from fuserl_kernels.packed_weight import PackedWeight

KEEP_SHARE = 0.75
"""Live share of the rows below which the ended ones are dropped from the batch."""
GRAPH_STEPS = 8
"""Captured steps between two looks of the host: what a row decodes on behind a stop string, at
most, is twice that, less one. Limits the host knows."""


PREFILL_TOKENS = 16_384
"""Of prompts that are computed together, unless one is longer. More would be no faster, and what a
layer makes of them takes memory that the cache could have."""


class ModuleRunner:
    """See Runner."""

    can_refill = True

    def __init__(self, model: LanguageModel, shape: CacheShape, options: RunnerOptions) -> None:
        assert isinstance(model.trunk, Decoder)
        self._model, self._trunk, self._options = model, model.trunk, options
        self._cache = KVCache(model.config, shape, model.trunk.dtype, model.device)
        self.rows = allocate_rows(model, shape)
        self.cache_bytes, self.weight_bytes, self.num_flagged = self._cache.num_bytes, 0, 0
        self._steps_left = 0  # within which the last live row ends
        self._product: Product = torch_product
        self._packed: PackedProducts | None = None
        if _can_pack(model):
            self._product = self._packed = PackedProducts(model.trunk, model.output_weight)
            self.weight_bytes = self._packed.num_bytes
        device, vocab_size = model.device, model.config.vocab_size
        self._is_stop = options.stop.stop_table(vocab_size, device)
        self._is_flag = options.stop.flag_table(vocab_size, device)
        # By slot, with a column for rows that are off: final lengths, and what ended them.
        self._endings = torch.zeros(2, shape.num_slots + 1, dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # ended, flagged
        self._poll = Poll(self._counts)
        self._kept: Tensor | None = None
        if options.keep_before:
            sizes = (shape.num_slots + 1, shape.capacity, model.config.hidden_size)
            self._kept = torch.empty(sizes, dtype=model.trunk.dtype, device=device)
        layers = [layer for layer in model.trunk.layers if isinstance(layer, Layer)]
        self._tables = {layer.attn.table for layer in layers}
        self._held: list[tuple[Tensor, Tensor]] = []  # what steps have read of them
        self._hold_tables()
        self.graphs = CapturedSteps(self.rows) if device.type == "cuda" else None

    @property
    def cache(self) -> KVCache:
        return self._cache

    @torch.no_grad()
    def prepare(self, num_rows: int) -> None:
        """Capture now what up to num_rows rows can need, instead of when it is needed."""
        if self.graphs is not None:
            self._hold_tables()
            self.graphs.prepare(self._step, num_rows)

    @torch.no_grad()
    def admit(self, prompts: Sequence[NewPrompt], rows: Sequence[NewRow]) -> list[Tensor | None]:
        kept: list[Tensor | None] = []
        for part in _parts(prompts, PREFILL_TOKENS):
            kept += self._prefill(part)
        left = self._steps_left if self.rows.num_rows else 0
        self._steps_left = max(left, *(row.limit for row in rows))
        self.rows.start(rows)
        return kept

    def _prefill(self, prompts: Sequence[NewPrompt]) -> list[Tensor | None]:
        device = self._model.device
        token_ids, lengths = pack_prompts(prompts, device)
        packing = Packing.of(lengths, device)
        items = torch.tensor([prompt.item for prompt in prompts], device=device)
        self._cache.prompt_lengths[items] = torch.tensor(lengths, device=device)
        # The bits of cached decoding are wanted on a CPU, where a test holds every row to them, and
        # by the exact mode; elsewhere prompts are read as training reads them.
        from_cache = device.type == "cpu" or self._trunk.exact
        step = PrefillStep(packing, self._cache, items, self._product, from_cache=from_cache)
        hidden, stream = self._pass(token_ids, step)
        self.rows.prompt_hidden[items] = hidden[packing.last]
        return [None] * len(prompts) if stream is None else list(stream.split(lengths))

    def _pass(self, token_ids: Tensor, step: Step) -> tuple[Tensor, Tensor | None]:
        """Hidden states, and the stream that is to be kept."""
        if self._kept is None:
            return self._trunk.run(token_ids, step), None
        stream = self._trunk.lower(token_ids, step, self._options.keep_before)
        return self._trunk.upper(stream, step, self._options.keep_before), stream

    @torch.no_grad()
    def run(self, max_steps: int, enough: int) -> list[Ended]:
        rows = self.rows
        self._counts.zero_()
        self._endings.zero_()
        self._poll.restart()  # the run before has waited for its end
        live = rows.num_rows
        left = min(max_steps, self._steps_left)
        if self.graphs is not None:
            self._hold_tables()
        while rows.num_rows:
            num_steps = min(left, 1 if self.graphs is None else GRAPH_STEPS)
            if self.graphs is None:
                self._step(rows.num_rows)
            else:
                self.graphs.replay(self._step, rows.num_rows, num_steps)
            left -= num_steps
            self._steps_left -= num_steps
            if left == 0:
                break
            num_ended, num_flagged = self._poll.look()
            if num_ended >= min(enough, live) or num_flagged:
                break
            if live - num_ended <= KEEP_SHARE * rows.num_rows:
                self._compact()
        return self._take_ended()

    def _hold_tables(self) -> None:
        """A rotary table that grows, for a longer sequence elsewhere, is made anew: graphs go on
        reading the old one, and those captured from then on read the new one."""
        for table in self._tables:
            used = table.upto(self._cache.num_positions, self._model.device)
            if not any(used is held for held in self._held):
                self._held.append(used)

    def _take_ended(self) -> list[Ended]:
        """The rows that ended since `run` began, and the others moved together. All that the host
        needs comes in one copy, for which it waits."""
        rows, device = self.rows, self._model.device
        n, width = rows.num_rows, self._endings.shape[1]
        told = torch.cat((rows.slots[:n], self._endings.flatten(), self._counts)).tolist()
        slots, lengths, ends = told[:n], told[n : n + width - 1], told[n + width : -3]
        self.num_flagged = told[-1]
        live = [row for row, slot in enumerate(slots) if slot >= 0]
        if len(live) < n:
            rows.keep(torch.tensor(live, dtype=torch.int64, device=device))
        return [
            Ended(slot, length, End(end))
            for slot, (length, end) in enumerate(zip(lengths, ends, strict=True))
            if end != 0
        ]

    def _compact(self) -> None:
        live = self.rows.slots[: self.rows.num_rows] >= 0
        self.rows.keep(live.nonzero().squeeze(1))

    def _step(self, num_rows: int) -> None:
        """A token for each of the first num_rows rows. Reads and writes arrays that never move, and
        nothing of what it does depends on what they hold."""
        rows, sampling = self.rows, self._options.sampling
        slots, lengths = rows.slots[:num_rows], rows.lengths[:num_rows]
        hidden, prompt_ids = rows.hidden[:num_rows], rows.prompt_ids[:num_rows]
        drawn, logprobs, truncated = fk.sample_tokens(
            self._logits(hidden),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            request_ids=rows.request_ids[:num_rows],
            positions=lengths,
        )
        row = fk.advance_rows(
            drawn,
            logprobs,
            truncated,
            slots=slots,
            lengths=lengths,
            limits=rows.limits[:num_rows],
            prompt_ids=prompt_ids,
            prompt_lengths=self._cache.prompt_lengths,
            token_rows=rows.token_ids,
            logprob_rows=rows.logprobs,
            truncated_rows=rows.truncated_logprobs,
            endings=self._endings,
            counts=self._counts,
            is_stop=self._is_stop,
            is_flag=self._is_flag,
            num_positions=self._cache.num_positions,
        )
        step = DecodeStep(
            self._cache,
            self._product,
            # The stream of a last token is wanted too, where streams are kept.
            slots=slots if self._kept is None else row.slots,
            prompt_ids=prompt_ids,
            places=row.places,
            used=row.used,
            positions=row.positions,
        )
        following, stream = self._pass(row.token_ids, step)
        if self._kept is not None and stream is not None:
            self._kept.index_put_((row.at, row.places), stream)
        hidden.copy_(following)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._packed is None:
            return self._model.logits(hidden)
        sizes = (len(hidden), self._model.config.vocab_size)
        logits = torch.empty(sizes, dtype=torch.float32, device=hidden.device)
        self._packed.head.linear(hidden, self._model.output_bias, logits)
        if (softcap := self._model.config.final_softcap) is not None:
            # As losses do it, to the bit; torch's tanh rounds otherwise.
            native.module().cap_logits(
                logits=logits.data_ptr(),
                num_rows=len(logits),
                vocab_size=logits.shape[1],
                softcap=softcap,
                num_threads=torch.get_num_threads(),
            )
        return logits

    def keep(self, rows: Tensor) -> None:
        self.rows.keep(rows)

    def kept(self, slot: int, length: int) -> Tensor | None:
        return None if self._kept is None else self._kept[slot, :length].clone()


def _parts(prompts: Sequence[NewPrompt], most_tokens: int) -> Iterator[Sequence[NewPrompt]]:
    """In order, each as many as have so many tokens together, and at least one."""
    first = num_tokens = 0
    for number, prompt in enumerate(prompts):
        if number > first and num_tokens + len(prompt.ids) > most_tokens:
            yield prompts[first:number]
            first, num_tokens = number, 0
        num_tokens += len(prompt.ids)
    if prompts:
        yield prompts[first:]


def _can_pack(model: LanguageModel) -> bool:
    """Whether this machine and the choice of implementations have products in a fixed order."""
    if model.device.type != "cpu" or native.why_absent() is not None:
        return False
    table: backend.Table = {
        "native": PackedWeight.of,
        "triton": torch_product,
        "reference": torch_product,
    }
    return backend.select("packed products", table, model.output_weight) is table["native"]

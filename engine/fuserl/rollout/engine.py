"""Requests in, completions out as they finish: slots that are refilled as they come free.

A prompt is computed once for all its completions and its keys are stored once. A completion depends
on the weights, its prompt and limit, the sampling rule, the seed and its request id: not on what is
decoded beside it, nor on order, slots or refills (through transformers' modules, and without the
compiled kernels, up to the rounding of products that depend on the size of a batch).
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fuserl.model.cache import CacheShape
from fuserl.model.decoder import Decoder
from fuserl.model.heads import LanguageModel
from fuserl.rollout import native_runner
from fuserl.rollout.kept_runner import Lease, RolloutMemory
from fuserl.rollout.live_rows import Ended, NewPrompt, NewRow
from fuserl.rollout.memory import is_out_of_memory
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.native_runner import NativeRunner
from fuserl.rollout.requests import Completion, End, PromptRequest
from fuserl.rollout.runner import Runner, RunnerOptions
from fuserl.rollout.wave_runner import WaveRunner
from fuserl_kernels import backend

logger = logging.getLogger(__name__)

STEPS_BETWEEN_CALLS = 16
"""Tokens a row gets, at most, before on_step is asked again."""
STEPS_BETWEEN_CALLS_ON_CUDA = 64
"""There a step is short, and the device stands still while the host takes stock."""
REFILL_SHARE = 8
"""Slots are refilled once this part of them is free: prompts are computed faster together."""


@dataclass(slots=True)
class RolloutFacts:
    """What one rollout came to."""

    num_slots: int = 0
    cache_bytes: int = 0
    weight_bytes: int = 0
    """Of copies of the weights that lived as long as the rollout."""
    prompt_states: list[Tensor | None] = field(default_factory=list)
    """Of each prompt, in the requests' order: the kept stream, [P, D]."""

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        return {
            "rollout/num_slots": self.num_slots,
            "rollout/kv_bytes": self.cache_bytes,
            "rollout/packed_weight_bytes": self.weight_bytes,
        }


def generate(
    model: LanguageModel,
    requests: Sequence[PromptRequest],
    options: RunnerOptions,
    *,
    num_slots: int | None = None,
    kv_budget_bytes: int | None = None,
    on_step: Callable[[], None] | None = None,
    facts: RolloutFacts | None = None,
    memory: RolloutMemory | None = None,
    shares_device: bool = False,
) -> Iterator[Completion]:
    """Completions in the order in which they finish; `index` says whose they are.

    num_slots: sequences decoded at a time; kv_budget_bytes: for keys and values; defaults: see
    plan.py. on_step is called every few tokens and may raise to give the rollout up. facts: filled
    in. memory: what stays on a CUDA device for the next rollout, default nothing. When memory runs
    out, the rollout goes on with half the slots; what had finished stays. shares_device: another
    thread may use the device meanwhile: all graphs are captured before the first token, as what
    that thread does during a capture may fail.

    The model's weights must not change before the last completion is drawn.

    Raises ValueError for logits that hold no distribution (NaN).
    """
    facts = RolloutFacts() if facts is None else facts
    facts.prompt_states = [None] * len(requests)
    memory = RolloutMemory(keeps=False) if memory is None else memory
    queue = _Queue(requests)
    handled, asked = sys.exception(), _Asked(on_step)
    while queue:
        lease: Lease | None = None
        try:
            with torch.inference_mode(False):  # the caller's mode may be another at the next draw
                lease = memory.take(
                    make_runner(model), model, requests, options, num_slots, kv_budget_bytes
                )
            if shares_device and isinstance(lease.runner, ModuleRunner):
                lease.runner.prepare(lease.shape.num_slots)
            facts.num_slots = lease.shape.num_slots
            facts.cache_bytes = lease.runner.cache_bytes
            facts.weight_bytes = lease.runner.weight_bytes
            yield from _Schedule(lease.runner, queue, options, lease.shape, facts).run(asked)
            memory.put_back(lease)
            return
        except (MemoryError, RuntimeError) as error:
            if asked.raised or not is_out_of_memory(error, handled) or memory.num_slots == 1:
                raise
        lease = None  # its memory is needed
        before, now = memory.num_slots, memory.shrink()
        logger.warning(
            "out of memory with %d sequences at a time: the rollout goes on with %d", before, now
        )
        queue.restart()


def make_runner(
    model: LanguageModel,
) -> Callable[..., Runner]:
    """The class that runs a model's rollouts."""
    if not isinstance(model.trunk, Decoder):
        return WaveRunner
    if native_runner.why_not(model) is not None:
        return ModuleRunner
    table = {"native": NativeRunner, "triton": ModuleRunner, "reference": ModuleRunner}
    return backend.select("rollout", table, model.output_weight)


class _Asked:
    """The caller's on_step, and whether it raised: that is no fault of the rollout's. (The error
    itself is not kept: it holds on to the frames it passed, and they to the cache.)"""

    def __init__(self, on_step: Callable[[], None] | None) -> None:
        self._on_step = on_step
        self.raised = False

    def __call__(self) -> None:
        if self._on_step is None:
            return
        self.raised = True
        self._on_step()
        self.raised = False


@dataclass(frozen=True, slots=True)
class _Sample:
    index: int  # among all requests
    prompt: int
    request_id: int


class _Queue:
    """Requests that have not finished, longest limits first: what ends last begins first. The
    samples of a prompt stand together."""

    def __init__(self, requests: Sequence[PromptRequest]) -> None:
        self.requests = requests
        samples, index = [], 0
        for number, request in enumerate(requests):
            for request_id in request.request_ids:
                samples.append(_Sample(index, number, request_id))
                index += 1
        samples.sort(key=lambda sample: -requests[sample.prompt].max_new_tokens)
        self._samples = samples
        self._finished: set[int] = set()
        self.waiting = deque(samples)

    def __bool__(self) -> bool:
        return len(self._finished) < len(self._samples)

    def finish(self, sample: _Sample) -> None:
        self._finished.add(sample.index)

    def restart(self) -> None:
        """What is not finished waits again."""
        self.waiting = deque(s for s in self._samples if s.index not in self._finished)


class _Schedule:
    """Which request is in which slot of one runner."""

    def __init__(
        self,
        runner: Runner,
        queue: _Queue,
        options: RunnerOptions,
        shape: CacheShape,
        facts: RolloutFacts,
    ) -> None:
        self._runner, self._queue, self._stop, self._facts = runner, queue, options.stop, facts
        self._free_slots = list(reversed(range(shape.num_slots)))
        self._free_items = list(reversed(range(shape.num_prompts)))
        is_cuda = runner.rows.slots.is_cuda
        self._max_steps = STEPS_BETWEEN_CALLS_ON_CUDA if is_cuda else STEPS_BETWEEN_CALLS
        self._live: dict[int, _Sample] = {}  # by slot
        self._items: dict[int, int] = {}  # of prompts that are in the cache
        self._num_live: dict[int, int] = {}  # samples of each of them
        self._flagged = options.stop.flagged_ids
        self._looked_at: dict[int, int] = {}  # tokens of a slot that were searched for strings

    def run(self, on_step: Callable[[], None]) -> Iterator[Completion]:
        while self._queue:
            on_step()
            self._admit()
            for ended in self._runner.run(self._max_steps, self._enough()):
                yield self._finish(ended)
            if self._runner.num_flagged:
                yield from self._stop_by_strings()

    def _enough(self) -> int:
        """Ended rows that make it worth looking after the others."""
        if not self._queue.waiting or not self._runner.can_refill:
            return len(self._live)
        num_slots = len(self._live) + len(self._free_slots)
        return max(1, min(len(self._live), num_slots // REFILL_SHARE))

    def _admit(self) -> None:
        if self._live and not self._runner.can_refill:
            return
        waiting = self._queue.waiting
        prompts: list[NewPrompt] = []
        numbers: list[int] = []
        rows: list[NewRow] = []
        while waiting and self._free_slots:
            sample = waiting[0]
            request = self._queue.requests[sample.prompt]
            if sample.prompt not in self._items:
                if not self._free_items:
                    break  # a straggler holds a prompt's place
                self._items[sample.prompt] = self._free_items.pop()
                self._num_live[sample.prompt] = 0
                prompts.append(NewPrompt(self._items[sample.prompt], request.ids))
                numbers.append(sample.prompt)
            waiting.popleft()
            slot = self._free_slots.pop()
            self._live[slot] = sample
            self._num_live[sample.prompt] += 1
            item = self._items[sample.prompt]
            rows.append(NewRow(slot, item, request.max_new_tokens, sample.request_id))
        if not rows:
            return
        states = self._runner.admit(prompts, rows)
        for number, state in zip(numbers, states, strict=True):
            self._facts.prompt_states[number] = state

    def _finish(self, ended: Ended) -> Completion:
        """Take a row's completion out and free what it held."""
        sample, rows = self._live.pop(ended.slot), self._runner.rows
        length, end = ended.length, ended.end
        if end is End.BROKEN:
            raise ValueError(
                f"the model's logits hold no distribution (NaN, or all -inf) for request "
                f"{sample.request_id} at completion token {length - 1}; its weights are probably "
                "broken"
            )
        token_ids = rows.token_ids[ended.slot, :length].clone()
        # A row may have gone on behind a stop string before the host looked.
        if self._stop.strings and (met := self._stop.met_at(token_ids.tolist())) is not None:
            length, end, token_ids = met, End.STOP, token_ids[:met]
        completion = Completion(
            index=sample.index,
            token_ids=token_ids,
            logprobs=rows.logprobs[ended.slot, :length].clone(),
            truncated_logprobs=rows.truncated_logprobs[ended.slot, :length].clone(),
            end=end,
            trunk_states=self._runner.kept(ended.slot, length),
        )
        self._queue.finish(sample)
        self._looked_at.pop(ended.slot, None)
        self._free_slots.append(ended.slot)
        self._num_live[sample.prompt] -= 1
        if self._num_live[sample.prompt] == 0 and not self._is_wanted(sample.prompt):
            self._free_items.append(self._items.pop(sample.prompt))
        return completion

    def _is_wanted(self, prompt: int) -> bool:
        """Whether samples of a prompt wait that can use its keys: they stand together, so that the
        first that waits is one. Rows that wait for all others to end get a cache of their own."""
        waiting = self._queue.waiting
        return self._runner.can_refill and bool(waiting) and waiting[0].prompt == prompt

    def _stop_by_strings(self) -> Iterator[Completion]:
        """End the rows whose text holds a stop string."""
        rows = self._runner.rows
        n = rows.num_rows
        slots, lengths = rows.slots[:n], rows.lengths[:n].tolist()
        token_rows = rows.token_ids[slots, : max(lengths, default=0)].tolist()
        numbers = zip(slots.tolist(), lengths, token_rows, strict=True)
        found = []
        for slot, length, token_ids in numbers:
            new = token_ids[self._looked_at.get(slot, 0) : length]
            self._looked_at[slot] = length
            if self._flagged.isdisjoint(new):
                continue
            met = self._stop.met_at(token_ids[:length])
            if met is not None:
                found.append(Ended(slot, met, End.STOP))
        if not found:
            return
        # First what may run out of memory: a row that is finished is not computed again.
        self._runner.keep(rows.without([ended.slot for ended in found]))
        for ended in found:
            yield self._finish(ended)

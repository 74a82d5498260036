"""A runner that outlives its rollout on a CUDA device: cache, rows and captured graphs.

To capture a step for every size of a batch takes seconds, and a graph is good as long as what it
reads and writes stays in place. Optimizers write weights in place; so whoever rolls out again and
again on one model owns a RolloutMemory, and the second rollout begins where the first one ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fuserl.model.cache import CacheShape
from fuserl.model.heads import LanguageModel
from fuserl.model.lora_linear import LoRALinear
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.plan import free_bytes, plan_cache, shape_for, wanted_slots
from fuserl.rollout.requests import PromptRequest
from fuserl.rollout.runner import Runner, RunnerOptions
from fuserl_kernels import backend
from fuserl_kernels.decode_attention import FORWARD

KEPT_SHARE = 0.4
"""Of the memory that is free when a runner is made, which its cache may hold between rollouts:
whoever works on the device meanwhile needs the rest."""
PROMPT_ROOM = 64
"""Prompts of a kept runner have room up to a multiple of it: the longest prompt of the next rollout
is seldom longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A runner, and the part of its cache that one rollout uses."""

    runner: Runner
    shape: CacheShape
    cache: CacheShape
    key: tuple[object, ...]
    is_short: bool
    """Whether memory had room for fewer slots than were wanted."""
    stays: bool
    """Whether the runner may wait for the next rollout."""

    def part(self, wanted: CacheShape) -> CacheShape | None:
        """What a rollout that wants this shape uses of the cache; None where that is too small."""
        have = self.cache
        if have.capacity < wanted.capacity or have.prompt_capacity < wanted.prompt_capacity:
            return None
        if have.num_slots < wanted.num_slots and not self.is_short:
            return None
        return replace(have, num_slots=min(have.num_slots, wanted.num_slots))


class RolloutMemory:
    """At most one runner, between rollouts. On a CPU nothing is kept: weights are packed anew for
    each rollout, and memory is better given back.

    A rollout that ends early, by an error or because nobody asked for its rest, leaves none.
    """

    def __init__(self, keeps: bool = True, share: float | None = KEPT_SHARE) -> None:
        """keeps: False where there will be one rollout. share: of free memory, that a cache is made
        with; None: as much as for one rollout alone, and a larger cache than KEPT_SHARE is not
        kept."""
        self._keeps, self._share = keeps, share
        self._kept: Lease | None = None
        self._most_slots: int | None = None
        self.num_slots = 1
        """Of the runner that was made or lent last, or was to be made when memory ran out."""

    @property
    def kept(self) -> Runner | None:
        """The runner that waits for the next rollout."""
        return None if self._kept is None else self._kept.runner

    def take(
        self,
        make: Callable[[LanguageModel, CacheShape, RunnerOptions], Runner],
        model: LanguageModel,
        requests: Sequence[PromptRequest],
        options: RunnerOptions,
        num_slots: int | None = None,
        budget_bytes: int | None = None,
    ) -> Lease:
        """The kept runner where it suits, else a new one; out of here until `put_back`.

        It suits for the same model while parameters are where they were, with the same options and
        budget, and with a cache that is large enough.
        """
        kept, self._kept = self._kept, None
        num_slots = wanted_slots(model, requests, num_slots)
        if self._most_slots is not None:
            num_slots = min(num_slots, self._most_slots)
        key = (budget_bytes, *_key(model, options))
        if kept is not None and kept.key == key:
            part = kept.part(shape_for(requests, num_slots))
            if part is not None:
                self.num_slots = part.num_slots
                return replace(kept, shape=part)
        if kept is not None:
            kept = None
            torch.cuda.empty_cache()  # what only its graphs used comes back no other way
        stays = self._keeps and model.device.type == "cuda"
        most = KEPT_SHARE * free_bytes(model.device) if self._keeps else 0.0
        share = self._share if stays else None
        shape = plan_cache(model, requests, num_slots, budget_bytes, share)
        if stays:
            room = -(-shape.prompt_capacity // PROMPT_ROOM) * PROMPT_ROOM
            shape = replace(shape, prompt_capacity=min(room, model.config.max_positions))
        self.num_slots = shape.num_slots
        is_small = shape.num_bytes(model.config, model.trunk.dtype) <= most
        return Lease(
            runner=make(model, shape, options),
            shape=shape,
            cache=shape,
            key=key,
            is_short=shape.num_slots < num_slots,
            stays=self._share is not None or is_small,
        )

    def put_back(self, lease: Lease) -> None:
        """After a rollout that ended well."""
        runner = lease.runner
        if not self._keeps or not isinstance(runner, ModuleRunner) or runner.graphs is None:
            return
        if lease.stays:
            self._kept = lease

    def shrink(self) -> int:
        """Memory ran out: nothing is kept, and from now on rollouts have half the slots at most,
        which is returned."""
        self._most_slots = max(1, self.num_slots // 2)
        self.release()
        return self._most_slots

    def release(self) -> None:
        """Give memory back to the device. The next rollout captures anew."""
        self._kept = None
        torch.cuda.empty_cache()

    def give_way(self) -> None:
        """Another's work ran out of memory: release what is kept, and from now on make caches of
        half the share of free memory."""
        if self._share is not None:
            self._share /= 2
        self.release()

    def __reduce__(self) -> tuple[type, tuple[bool, float | None]]:
        """A copy keeps nothing: graphs hold the addresses of one model."""
        return RolloutMemory, (self._keeps, self._share)


def _key(model: LanguageModel, options: RunnerOptions) -> tuple[object, ...]:
    """Equal as long as captured graphs are valid. Seed and temperature are numbers in them; which
    adapters are on, which kernels are chosen, and how torch makes products in float32 decided what
    was launched."""
    addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
    adapters = tuple(m.is_on for m in model.modules() if isinstance(m, LoRALinear))
    kernels = backend.select("decode_attention", FORWARD, model.output_weight)
    precision = torch.get_float32_matmul_precision()
    return id(model), addresses, adapters, kernels, precision, options

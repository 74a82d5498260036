"""How much a rollout holds at a time: the slots and prompts of its cache, within a budget."""

import os
from collections.abc import Sequence

import torch

from fuserl.model.cache import CacheShape
from fuserl.model.heads import LanguageModel
from fuserl.rollout.requests import PromptRequest

DEFAULT_SLOTS = {"cpu": 64, "cuda": 256}
"""Rows at a time. More gain little: on a CPU products are at their speed by then, on a GPU the
step is bound by arithmetic from about 184 rows on."""
BUDGET_SHARE = {"cpu": 0.5, "cuda": 0.8}
"""Of the memory that is free now, for keys and values."""


def wanted_slots(
    model: LanguageModel, requests: Sequence[PromptRequest], num_slots: int | None = None
) -> int:
    """As many as asked for (default: DEFAULT_SLOTS), and as there are requests. ValueError for
    none."""
    if num_slots is not None and num_slots < 1:
        raise ValueError(f"num_slots must be at least 1, got {num_slots}")
    num_requests = sum(len(request.request_ids) for request in requests)
    return min(num_slots or DEFAULT_SLOTS.get(model.device.type, 64), num_requests)


def plan_cache(
    model: LanguageModel,
    requests: Sequence[PromptRequest],
    num_slots: int | None = None,
    budget_bytes: int | None = None,
    budget_share: float | None = None,
) -> CacheShape:
    """The wanted slots, or as many as the budget (default: budget_share of free memory, default
    BUDGET_SHARE) has room for. ValueError for a budget that has no room for one request."""
    device = model.device.type
    slots = wanted_slots(model, requests, num_slots)
    if budget_bytes is None:
        share = BUDGET_SHARE.get(device, 0.5) if budget_share is None else budget_share
        budget_bytes = int(free_bytes(model.device) * share)
    while True:
        shape = shape_for(requests, slots)
        needed = shape.num_bytes(model.config, model.trunk.dtype)
        if needed <= budget_bytes:
            return shape
        if slots == 1:
            raise ValueError(
                f"one request needs {needed:,} bytes for its keys and values, and the budget is "
                f"{budget_bytes:,}: lower max_new_tokens or give kv_budget_bytes more"
            )
        slots = max(1, min(slots - 1, int(slots * budget_bytes / needed)))


def shape_for(requests: Sequence[PromptRequest], num_slots: int) -> CacheShape:
    """The cache of num_slots rows. Prompts stay as long as one of their samples lives: twice as
    many as the slots' rows have when groups begin together, so that stragglers hold up nothing."""
    num_samples = max(len(request.request_ids) for request in requests)
    together = -(-num_slots // num_samples)
    return CacheShape(
        num_slots=num_slots,
        capacity=max(request.max_new_tokens for request in requests),
        num_prompts=min(len(requests), num_slots, 2 * together),
        prompt_capacity=max(len(request.ids) for request in requests),
    )


def free_bytes(device: torch.device) -> int:
    """Memory that could be had now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

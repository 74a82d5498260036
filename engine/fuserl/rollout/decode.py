"""The decode loop: ragged prompts in, sampled completions with their log-probabilities out.

Prompts are computed and cached once, whatever the number of samples of each. A row's randomness
is keyed by (seed, request id, completion index), so its draws do not depend on the rows beside it.
Rows that ended are dropped from the batch once they are a quarter of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.data.batching import pad_rows
from fuserl.model.config import DecoderConfig
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import Packing
from fuserl.model.trunk_keeper import TrunkKeeper
from fuserl.rollout.sampling import SamplingParams

KEEP_SHARE = 0.75
"""Live share of the rows below which the ended ones are dropped from the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """R rows, prompts' order, the samples of a prompt together."""

    prompts: Tensor  # [R, P] int64, right-padded
    prompt_lengths: Tensor  # [R] int64
    token_ids: Tensor  # [R, T] int64, right-padded, EOS included
    lengths: Tensor  # [R] int64, EOS included
    has_eos: Tensor  # [R] bool
    logprobs: Tensor  # [R, T] fp32, 0 after the end
    trunk_states: Tensor | None = None  # [tokens, D]: see RolloutBatch
    trunk_starts: Tensor | None = None  # [R, 2] int64


@torch.no_grad()
def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams,
    eos_token_id: int | None,
    num_samples: int = 1,
    request_ids: Sequence[int] | None = None,
    on_step: Callable[[], None] | None = None,
    keep_before: int = 0,
) -> Completions:
    """Sample `num_samples` completions of every prompt.

    max_new_tokens: one limit, or one a prompt. eos_token_id None: nothing but the limit ends a
    row. request_ids: one a row (prompt-major), default the row's number. on_step is called
    before each token and may raise to give the rollout up. keep_before: the layer before which
    the residual stream of every token is kept, in trunk_states (0: nothing is).

    Raises ValueError for an empty prompt, for a token id outside the vocabulary, for a request
    longer than the model's positions, and for logits that hold no distribution (NaN).
    """
    limits = check_request(model.config, prompts, max_new_tokens)
    device = model.device
    rows = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
    padded, lengths = (tensor.to(device) for tensor in pad_rows(prompts))
    limit = torch.tensor(limits, device=device)[rows]
    if request_ids is None:
        request_ids = range(len(rows))
    requests = torch.tensor(list(request_ids), device=device)

    # An ended row decodes on, unread, until it is dropped: its slot has room for that.
    packing = Packing.of([len(prompt) for prompt in prompts], device)
    trunk = TrunkKeeper(model.trunk, keep_before) if keep_before else model.trunk
    cache = trunk.new_cache(packing, rows, max(limits))
    hidden = trunk.prefill(padded[packing.rows, packing.positions], cache)
    hidden = hidden[packing.last[rows]]  # [rows, D]

    width = max(limits)
    token_ids = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(rows), width, device=device)
    ended_at = limit.clone()
    has_eos = torch.zeros(len(rows), dtype=torch.bool, device=device)
    live = torch.arange(len(rows), device=device)  # the rows of the batch as it stands
    for step in range(width):
        if on_step is not None:
            on_step()
        logits = model.logits(hidden)
        drawn, drawn_logprobs, _ = fk.sample_tokens(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=sampling.seed,
            request_ids=requests[live],
            positions=torch.full_like(live, step),
        )
        # Nothing is picked by a mask here: to count it would wait for the device.
        running = ended_at[live] > step  # a row that ended is still in the batch until dropped
        token_ids[live, step] = torch.where(running, drawn, 0)
        logprobs[live, step] = torch.where(running, drawn_logprobs, 0.0)
        if eos_token_id is not None:
            finished = running & (drawn == eos_token_id)
            has_eos[live] = has_eos[live] | finished
            ended_at[live] = torch.where(finished, step + 1, ended_at[live])
        running = ended_at[live] > step + 1
        # One wait for the device tells both.
        num_running, num_broken = torch.stack([running.sum(), (drawn < 0).sum()]).tolist()
        if num_broken:
            raise ValueError(_no_distribution(requests[live[drawn < 0]], step))
        if num_running == 0:
            break
        if num_running <= KEEP_SHARE * len(live):
            kept_rows = (~running).argsort(stable=True)[:num_running]
            cache.keep(kept_rows)
            live, drawn = live[kept_rows], drawn[kept_rows]
        hidden = trunk.decode(drawn, cache)

    kept: tuple[Tensor | None, Tensor | None] = (None, None)
    if isinstance(trunk, TrunkKeeper):
        last = token_ids.gather(1, ended_at[:, None] - 1).squeeze(1)
        kept = trunk.finish(last, ended_at, cache)
    longest = int(ended_at.max())
    return Completions(
        prompts=padded[rows],
        prompt_lengths=lengths[rows],
        token_ids=token_ids[:, :longest],
        lengths=ended_at,
        has_eos=has_eos,
        logprobs=logprobs[:, :longest],
        trunk_states=kept[0],
        trunk_starts=kept[1],
    )


def check_request(
    config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]
) -> list[int]:
    """The limit of each prompt; ValueError, as `decode` says, for what cannot be decoded."""
    if isinstance(max_new_tokens, int):
        limits = [max_new_tokens] * len(prompts)
    else:
        limits = list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ValueError(f"max_new_tokens has {len(limits)} entries for {len(prompts)} prompts")
    if not limits:
        raise ValueError("prompts must not be empty")
    if min(limits) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {min(limits)}")
    check_token_ids(config, "prompts", prompts)
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty: it needs at least one token")
        if len(prompt) + limit > config.max_positions:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens {limit} it passes "
                f"the model's {config.max_positions} positions"
            )
    return limits


def check_token_ids(config: DecoderConfig, name: str, rows: Sequence[Sequence[int]]) -> None:
    """ValueError for a token id outside the vocabulary."""
    for i, row in enumerate(rows):
        if row and (min(row) < 0 or max(row) >= config.vocab_size):
            wrong = next(token for token in row if not 0 <= token < config.vocab_size)
            raise ValueError(
                f"{name}[{i}] holds token id {wrong}, outside the vocabulary of {config.vocab_size}"
            )


def _no_distribution(request_ids: Tensor, step: int) -> str:
    return (
        f"the model's logits hold no distribution (NaN, or all -inf) for request "
        f"{int(request_ids[0])} at completion token {step}; its weights are probably broken"
    )

"""A whole rollout as one rectangular record: ragged prompts in, sampled completions out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.data.batching import pad_rows
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import Packing
from fuserl.rollout.engine import RolloutFacts, generate
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.requests import Completion, End, PromptRequest, check_request
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """R rows, prompts' order, the samples of a prompt together."""

    prompts: Tensor  # [R, P] int64, right-padded
    prompt_lengths: Tensor  # [R] int64
    token_ids: Tensor  # [R, T] int64, right-padded, EOS included
    lengths: Tensor  # [R] int64, EOS included
    has_eos: Tensor  # [R] bool: something but the limit ended it
    logprobs: Tensor  # [R, T] fp32, 0 after the end
    truncated_logprobs: Tensor  # [R, T] fp32, 0 after the end
    facts: RolloutFacts
    trunk_states: Tensor | None = None  # [tokens, D]: see RolloutBatch
    trunk_starts: Tensor | None = None  # [R, 2] int64


def decode(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams,
    eos_token_id: int | None = None,
    stop: StopRule | None = None,
    num_samples: int = 1,
    request_ids: Sequence[int] | None = None,
    num_slots: int | None = None,
    kv_budget_bytes: int | None = None,
    on_step: Callable[[], None] | None = None,
    on_completion: Callable[[Completion], None] | None = None,
    facts: RolloutFacts | None = None,
    keep_before: int = 0,
    memory: RolloutMemory | None = None,
) -> Completions:
    """Sample `num_samples` completions of every prompt.

    max_new_tokens: one limit, or one a prompt. stop: default, the id eos_token_id alone (None:
    nothing but the limit ends a row). request_ids: one a row (prompt-major), default the row's
    number. num_slots, kv_budget_bytes, on_step, facts, memory: see engine.generate. on_completion:
    called with each completion as it finishes. keep_before: the layer before which the residual
    stream of every token is kept, in trunk_states (0: nothing is).

    Raises ValueError for an empty prompt, for a token id outside the vocabulary, for a request
    longer than the model's positions, and for logits that hold no distribution (NaN).
    """
    limits = check_request(model.config, prompts, max_new_tokens)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    num_rows = len(prompts) * num_samples
    if request_ids is not None and len(request_ids) != num_rows:
        raise ValueError(f"request_ids has {len(request_ids)} entries for {num_rows} completions")
    ids = list(range(num_rows) if request_ids is None else request_ids)
    if stop is None:
        stop = StopRule.of(eos_token_id, vocab_size=model.config.vocab_size)
    requests = [
        PromptRequest(
            ids=prompt,
            max_new_tokens=limit,
            request_ids=ids[i * num_samples : (i + 1) * num_samples],
        )
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    facts = RolloutFacts() if facts is None else facts
    options = RunnerOptions(sampling=sampling, stop=stop, keep_before=keep_before)
    finished: dict[int, Completion] = {}
    for completion in generate(
        model,
        requests,
        options,
        num_slots=num_slots,
        kv_budget_bytes=kv_budget_bytes,
        on_step=on_step,
        facts=facts,
        memory=memory,
        shares_device=on_completion is not None,  # which may hand it to a thread
    ):
        finished[completion.index] = completion
        if on_completion is not None:
            on_completion(completion)
    return _gathered([finished[i] for i in range(num_rows)], prompts, num_samples, facts)


def _gathered(
    completions: Sequence[Completion],
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    facts: RolloutFacts,
) -> Completions:
    device = completions[0].token_ids.device
    padded, prompt_lengths = (tensor.to(device) for tensor in pad_rows(prompts))
    of_row = torch.arange(len(prompts), device=device).repeat_interleave(num_samples)
    lengths = [len(completion.token_ids) for completion in completions]

    def by_row(rows: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    states = starts = None
    if completions[0].trunk_states is not None:
        of_prompts = [state for state in facts.prompt_states if state is not None]
        of_completions = [c.trunk_states for c in completions if c.trunk_states is not None]
        states = torch.cat([*of_prompts, *of_completions])
        prompt_starts = Packing.of([len(state) for state in of_prompts], device).starts
        completion_starts = Packing.of(lengths, device).starts + sum(map(len, of_prompts))
        starts = torch.stack([prompt_starts[of_row], completion_starts], dim=1)
    return Completions(
        prompts=padded[of_row],
        prompt_lengths=prompt_lengths[of_row],
        token_ids=by_row([completion.token_ids for completion in completions]),
        lengths=torch.tensor(lengths, device=device),
        has_eos=torch.tensor([c.end is End.STOP for c in completions], device=device),
        logprobs=by_row([completion.logprobs for completion in completions]),
        truncated_logprobs=by_row([completion.truncated_logprobs for completion in completions]),
        facts=facts,
        trunk_states=states,
        trunk_starts=starts,
    )

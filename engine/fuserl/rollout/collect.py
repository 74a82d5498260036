"""The first phase of a step: which prompts, and completions sampled for them, as one record."""

from collections.abc import Callable, Collection, Sequence

from torch.nn.functional import pad

from fuserl.batch import RolloutBatch
from fuserl.config import RLConfig
from fuserl.data.batching import epoch_batches
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel
from fuserl.rollout.decode import decode
from fuserl.rollout.engine import RolloutFacts
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.requests import Completion
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule
from fuserl.sequences import mask_of_lengths


def choose_prompts(prompts: Sequence[Prompt], config: RLConfig, step: int) -> list[Prompt]:
    """The prompts of one rollout, num_samples times each: a function of (seed, step) alone, so
    that a resumed run sees the same. A data set smaller than a batch is gone through again."""
    per_epoch = max(1, len(prompts) // config.batch_size)
    epoch, batch = divmod(step, per_epoch)
    order = epoch_batches([0] * len(prompts), len(prompts), seed=config.seed, epoch=epoch)[0]
    first = batch * config.batch_size
    chosen = [prompts[order[i % len(order)]] for i in range(first, first + config.batch_size)]
    return [prompt for prompt in chosen for _ in range(config.num_samples)]


def rollout(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    config: RLConfig,
    *,
    eos_token_ids: Collection[int],
    step: int,
    on_step: Callable[[], None],
    on_completion: Callable[[Completion], None] | None = None,
    facts: RolloutFacts | None = None,
    memory: RolloutMemory | None = None,
) -> RolloutBatch:
    """Sample one completion for each of `prompts` (samples of one prompt stand together).

    eos_token_ids: each ends a completion. on_step: called every few tokens; it may raise to give
    the rollout up. on_completion: called with each completion as it finishes. facts: filled in.
    memory: see engine.generate."""
    out = decode(
        model,
        [prompt.ids for prompt in prompts[:: config.num_samples]],
        max_new_tokens=config.max_new_tokens,
        sampling=SamplingParams(temperature=config.temperature, seed=config.seed),
        stop=StopRule.of(None, stop_token_ids=eos_token_ids, vocab_size=model.config.vocab_size),
        num_samples=config.num_samples,
        request_ids=range(step * len(prompts), (step + 1) * len(prompts)),
        num_slots=config.rollout_slots,
        on_step=on_step,
        on_completion=on_completion,
        facts=facts,
        keep_before=model.trunk.shared_layers,
        memory=memory,
    )
    # One slot more than the longest completion, where the limit leaves room for it.
    width = min(config.max_new_tokens, out.token_ids.shape[1] + 1)
    padding = (0, width - out.token_ids.shape[1])
    return RolloutBatch(
        prompts=out.prompts,
        prompt_lengths=out.prompt_lengths,
        completions=pad(out.token_ids, padding),
        completion_lengths=out.lengths,
        has_eos=out.has_eos,
        loss_mask=mask_of_lengths(out.lengths, width),
        logprobs=pad(out.logprobs, padding),
        truncated_logprobs=pad(out.truncated_logprobs, padding),
        trunk_states=out.trunk_states,
        trunk_starts=out.trunk_starts,
    )

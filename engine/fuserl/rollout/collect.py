"""The first phase of a step: which prompts, and completions sampled for them, as one record."""

from collections.abc import Callable, Sequence

from torch.nn.functional import pad

from fuserl.batch import RolloutBatch
from fuserl.config import RLConfig
from fuserl.data.batching import epoch_batches
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel
from fuserl.rollout.decode import decode
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.sampling import SamplingParams
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
    eos_token_id: int | None,
    step: int,
    on_token: Callable[[], None],
    memory: RolloutMemory | None = None,
) -> RolloutBatch:
    """Sample one completion for each of `prompts` (samples of one prompt stand together).
    on_token: called every few tokens; it may raise to give the rollout up. memory: see
    engine.generate."""
    out = decode(
        model,
        [prompt.ids for prompt in prompts[:: config.num_samples]],
        max_new_tokens=config.max_new_tokens,
        sampling=SamplingParams(temperature=config.temperature, seed=config.seed),
        eos_token_id=eos_token_id,
        num_samples=config.num_samples,
        request_ids=range(step * len(prompts), (step + 1) * len(prompts)),
        on_step=on_token,
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
        trunk_states=out.trunk_states,
        trunk_starts=out.trunk_starts,
    )

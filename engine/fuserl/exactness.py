"""The exact mode: the trainer's log-probabilities of sampled tokens are the sampler's, to the bit.

Then no pass computes old log-probabilities again, the first ratio of every rollout is 1, and
nothing between sampler and trainer is left to correct. It needs products in a fixed order and the
attention of cached decoding in the trainer's forward pass. Whether a model on this machine has both
is not assumed but tried.
"""

import logging

import torch
from torch import Tensor

from fuserl.model.decoder import Decoder
from fuserl.model.heads import LanguageModel
from fuserl.model.lora_linear import LoRALinear
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.sampling import SamplingParams
from fuserl.sequences import Sequences, completion_logprobs

logger = logging.getLogger(__name__)

PROMPT_LENGTHS = (1, 3, 17, 70, 260)
"""Of the trial; the last is past a split of cached attention. Shorter where a model has no room."""
NEW_TOKENS = 24


def make_exact(model: LanguageModel, temperature: float) -> bool:
    """Turn the exact mode on and try it on made-up prompts, in batches of several sizes. Where the
    bits differ it is turned off again, with a warning that says so. Returns whether it is on."""
    reason = _why_not(model)
    if reason is None:
        model.trunk.exact = True
        differing = count_differing(model, temperature)
        if differing == 0:
            return True
        model.trunk.exact = False
        reason = f"{differing} log-probabilities of a trial differ"
    logger.warning(
        "exact mode is OFF: the trainer's log-probabilities will not be the sampler's to the bit "
        "(%s). The gap is logged at each step; old_logprobs recomputed takes it out of the ratios.",
        reason,
    )
    return False


def _why_not(model: LanguageModel) -> str | None:
    if not isinstance(model.trunk, Decoder):
        return "this model runs through transformers"
    if model.config.max_positions < 2:
        return "it has no room for a prompt and a token"
    if model.device.type != "cpu":
        return f"it is made for a CPU, and the model is on {model.device}"
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        return "adapters are merged for the sampler and apart for the trainer"
    return None


@torch.no_grad()
def count_differing(model: LanguageModel, temperature: float) -> int:
    """Log-probabilities of a trial rollout that the trainer's forward pass does not reproduce to
    the bit, over all its rows together and one at a time; and those that another number of slots
    changed."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    positions = model.config.max_positions
    most = min(NEW_TOKENS, max(1, positions // 2))
    lengths = sorted({min(length, positions - most) for length in PROMPT_LENGTHS})
    prompts = [
        torch.randint(
            model.config.vocab_size, (length,), generator=generator, device="cpu"
        ).tolist()
        for length in lengths
        if length > 0
    ]
    sampling = SamplingParams(temperature=temperature)
    outs = [
        decode(
            model,
            prompts,
            max_new_tokens=[max(1, most - 3 * i) for i in range(len(prompts))],
            sampling=sampling,
            num_samples=2,
            num_slots=num_slots,
        )
        for num_slots in (2 * len(prompts), 3)
    ]
    differing = int((outs[0].logprobs != outs[1].logprobs).sum())
    rows = _rows(outs[0])
    for part in (rows, rows[:1], rows[-1:]):
        sequences = Sequences.of([row[0] for row in part], [row[1] for row in part])
        found = completion_logprobs(model, sequences, temperature)
        sampled = torch.cat([row[2] for row in part])
        differing += int((found != sampled).sum())
    return differing


def _rows(out: Completions) -> list[tuple[list[int], list[int], Tensor]]:
    """Prompt, completion and its log-probabilities, row by row."""
    lengths = zip(out.prompt_lengths.tolist(), out.lengths.tolist(), strict=True)
    return [
        (out.prompts[i, :p].tolist(), out.token_ids[i, :t].tolist(), out.logprobs[i, :t])
        for i, (p, t) in enumerate(lengths)
    ]

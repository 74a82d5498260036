"""Cached decoding of every family: greedy, token for token what transformers generates."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILY_MODELS, LENGTH, VOCAB_SIZE

from fuserl.policy import Policy, load_policy
from fuserl.rollout.decode import decode
from fuserl.rollout.sampling import SamplingParams

PROMPT_LENGTHS = (3, 17, 1, 9, LENGTH // 2)
NUM_TOKENS = LENGTH // 2


@pytest.fixture(params=FAMILY_MODELS, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' model, and the policy loaded from the folder it saved."""
    theirs = FAMILY_MODELS[request.param]()
    folder = tmp_path_factory.mktemp("family")
    theirs.save_pretrained(folder)
    return theirs, load_policy(folder)


def generated(theirs: Any, prompt: list[int], eos: int | None) -> list[int]:
    """By transformers, alone and greedily: what follows the prompt, EOS included."""
    ids = torch.tensor([prompt])
    theirs.generation_config.eos_token_id = eos
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers(pair: tuple[Any, Policy]) -> None:
    """Ragged prompts; then again with an EOS that ends some of the rows early."""
    theirs, policy = pair
    generator = torch.Generator().manual_seed(5)
    prompts = [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]

    def ours(**options: Any) -> list[list[int]]:
        out = policy.generate(prompts, max_new_tokens=NUM_TOKENS, temperature=0.0, **options)
        return out.token_ids

    free = ours(ignore_eos=True)
    assert free == [generated(theirs, prompt, None) for prompt in prompts]
    assert len({tuple(row) for row in free}) > 2
    # The id that is in most rows, though not in all, ends those early.
    shared = {token: sum(token in row[:-1] for row in free) for row in free for token in row}
    eos = max((t for t in shared if shared[t] < len(free)), key=lambda t: shared[t])
    ended = ours(eos_token_id=eos)
    assert ended == [generated(theirs, prompt, eos) for prompt in prompts]
    assert min(map(len, ended)) < NUM_TOKENS
    # Neither order nor slots change a token: one row at a time, some in turn, all at once.
    order = [3, 0, 4, 2, 1]
    for num_slots in (1, 2, 64):
        out = decode(
            policy.model,
            [prompts[i] for i in order],
            max_new_tokens=NUM_TOKENS,
            sampling=SamplingParams(temperature=0.0),
            eos_token_id=eos,
            num_samples=2,
            num_slots=num_slots,
        )
        rows = zip(out.token_ids.tolist(), out.lengths.tolist(), strict=True)
        assert [row[:n] for row, n in rows] == [ended[i] for i in order for _ in range(2)]


def test_samples_of_a_prompt_share_its_keys(pair: tuple[Any, Policy]) -> None:
    """Logprobs of the cached decoding, several samples a prompt, equal those of one forward."""
    _, policy = pair
    prompts = [[5, 9, 11, 40, 7, 8, 60], [33, 4]]
    out = policy.generate(prompts, max_new_tokens=NUM_TOKENS, n=3, seed=3, ignore_eos=True)
    each = [prompt for prompt in prompts for _ in range(3)]
    computed = policy.logprobs(each, out.token_ids)
    for stored, row in zip(out.logprobs, computed, strict=True):
        torch.testing.assert_close(torch.tensor(stored), row, rtol=2e-5, atol=2e-5)

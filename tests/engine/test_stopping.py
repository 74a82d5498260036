"""What ends a completion: ids, strings of its text, and the limit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_models import choose_runner

from fuserl.policy import Policy
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule
from fuserl.tokenizer import Tokenizer

TEXTS = ["red dog", "blue", "green cat runs", "old tree", "house"]
NUM_TOKENS = 40


def rule(tokenizer: Tokenizer | None, **options: Any) -> StopRule:
    size = tokenizer.vocab_size if tokenizer else 40
    return StopRule.of(None, tokenizer=tokenizer, vocab_size=size, **options)


@pytest.fixture(params=["native", "modules"])
def sample(
    request: pytest.FixtureRequest,
    make_policy: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Completions]:
    choose_runner(request.param, monkeypatch)
    policy = make_policy()
    prompts = policy.encode(TEXTS)

    def run(stop: StopRule, **options: Any) -> Completions:
        return decode(
            policy.model,
            prompts,
            max_new_tokens=NUM_TOKENS,
            sampling=SamplingParams(seed=2),
            stop=stop,
            num_samples=2,
            **options,
        )

    return run


def rows(out: Completions) -> list[list[int]]:
    return [row[:n] for row, n in zip(out.token_ids.tolist(), out.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("num_slots", [1, 3, 64])
def test_a_completion_ends_with_the_token_that_completes_a_string(
    num_slots: int, sample: Callable[..., Completions], tokenizer: Tokenizer
) -> None:
    """Found by cutting what goes on without it, token by token."""
    free = rows(sample(rule(tokenizer)))
    text = tokenizer.decode(free[3])
    strings = (text[12:15], text[30:32])
    expected = []
    for row in free:
        prefixes = (row[:n] for n in range(1, NUM_TOKENS + 1))
        met = (p for p in prefixes if any(s in tokenizer.decode(p) for s in strings))
        expected.append(next(met, row))
    out = sample(rule(tokenizer, stop=strings), num_slots=num_slots)
    assert rows(out) == expected
    assert out.has_eos.tolist() == [len(row) < NUM_TOKENS for row in expected]
    assert 0 < int(out.has_eos.sum()) < 10
    for row, length in enumerate(out.lengths.tolist()):
        assert out.logprobs[row, :length].all()
        assert not out.logprobs[row, length:].any()


def test_ids_end_completions(sample: Callable[..., Completions], tokenizer: Tokenizer) -> None:
    free = rows(sample(rule(tokenizer)))
    ids = {free[0][5], free[1][9]}
    stopped = StopRule.of(
        free[2][7], stop_token_ids=ids, vocab_size=tokenizer.vocab_size, tokenizer=tokenizer
    )
    ids.add(free[2][7])
    expected = [
        row[: next((n + 1 for n, token in enumerate(row) if token in ids), NUM_TOKENS)]
        for row in free
    ]
    out = sample(stopped)
    assert rows(out) == expected
    assert out.has_eos.tolist() == [row[-1] in ids for row in expected]
    assert out.has_eos.any()


def test_the_tables_name_every_token_that_may_end_it(tokenizer: Tokenizer) -> None:
    device, size = torch.device("cpu"), tokenizer.vocab_size
    nothing = rule(tokenizer)
    assert nothing.stop_table(size, device) is None
    assert nothing.flag_table(size, device) is None
    table = rule(tokenizer, stop_token_ids=[3, 5]).stop_table(size, device)
    assert table is not None
    assert table.nonzero().flatten().tolist() == [3, 5]
    flags = rule(tokenizer, stop=["og c", "x"]).flag_table(size, device)
    assert flags is not None
    for token in range(size):
        text = tokenizer.decode([token])
        assert bool(flags[token]) >= ("c" in text or "x" in text)
    assert not flags.all()
    spaced = rule(tokenizer, stop="dog ").flag_table(size, device)
    assert spaced is not None
    assert spaced.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ""}, "stop must not hold an empty string"),
        ({"stop": ["a", ""]}, "stop must not hold an empty string"),
        ({"stop_token_ids": [1, 99]}, "stop_token_ids 99 is outside the vocabulary of 40"),
        ({"stop_token_ids": [-1]}, "stop_token_ids -1 is outside"),
        ({"stop": "a"}, "stop strings need a tokenizer"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(None, **options)
    with pytest.raises(ValueError, match="eos_token_id 40 is outside the vocabulary of 40"):
        StopRule.of(40, vocab_size=40)

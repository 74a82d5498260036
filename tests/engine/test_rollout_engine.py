"""The schedule of a rollout: no completion depends on slots, order or neighbours; prompts are
computed once, slots filled again, the longest begun first."""

import dataclasses
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from random_models import (
    GROUPED,
    SAMPLINGS,
    assert_same,
    choose_runner,
    frequent_token,
    ragged_prompts,
    scrambled,
)

from fuserl.bench.memory import peak_extra_bytes, why_not_measured
from fuserl.interrupt import Interrupted
from fuserl.model.cache import CacheShape, KVCache
from fuserl.model.heads import LanguageModel
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.engine import make_runner
from fuserl.rollout.live_rows import Ended, NewPrompt, NewRow
from fuserl.rollout.plan import plan_cache
from fuserl.rollout.requests import PromptRequest

PROMPTS = ragged_prompts([3, 1, 17, 9, 5, 2, 30])
LIMITS = [20, 7, 40, 12, 1, 33, 18]
NUM_SAMPLES = 3
Sample = Callable[..., Completions]


@pytest.fixture(params=["native", "modules"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class that runs rollouts in this test."""
    return choose_runner(request.param, monkeypatch)


@pytest.fixture
def model(runner: type) -> LanguageModel:
    model = scrambled()
    assert make_runner(model) is runner
    return model


@pytest.fixture
def sample(model: LanguageModel) -> Sample:
    """A rollout of PROMPTS in an order, or of some of them: completions keep their numbers. Half
    of them end by an EOS before their limit."""
    options: dict[str, Any] = {"sampling": SAMPLINGS["cool"], "num_samples": NUM_SAMPLES}
    eos = frequent_token(model, PROMPTS, max_new_tokens=LIMITS, **options)

    def run(order: Sequence[int] = range(len(PROMPTS)), **changes: Any) -> Completions:
        given = {"request_ids": rows_of(order), "eos_token_id": eos, **options, **changes}
        prompts, limits = [PROMPTS[i] for i in order], [LIMITS[i] for i in order]
        return decode(model, prompts, max_new_tokens=limits, **given)

    return run


def rows_of(order: Sequence[int]) -> list[int]:
    return [i * NUM_SAMPLES + sample for i in order for sample in range(NUM_SAMPLES)]


class Watched:
    """What a runner was asked for, and how its rows then stood."""

    def __init__(self, kind: Any, patch: pytest.MonkeyPatch) -> None:
        self.prompts: list[NewPrompt] = []
        self.rows: list[NewRow] = []
        self.joined: list[int] = []  # rows that were live when others came
        self.ages: list[int] = []  # how many different ones stood together
        self.clashes: list[int] = []  # items that were taken from live rows
        admit, run = kind.admit, kind.run

        def watched_admit(it: Any, prompts: Sequence[NewPrompt], rows: Sequence[NewRow]) -> Any:
            used = set(it.rows.prompt_ids[: it.rows.num_rows].tolist())
            self.clashes += [prompt.item for prompt in prompts if prompt.item in used]
            self.joined.append(it.rows.num_rows)
            self.prompts += prompts
            self.rows += rows
            return admit(it, prompts, rows)

        def watched_run(it: Any, *limits: int) -> list[Ended]:
            self.ages.append(len(it.rows.lengths[: it.rows.num_rows].unique()))
            return run(it, *limits)

        patch.setattr(kind, "admit", watched_admit)
        patch.setattr(kind, "run", watched_run)


@pytest.fixture
def watched(runner: type, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(runner, monkeypatch)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 64])
def test_slots_and_order_change_nothing(num_slots: int, sample: Sample) -> None:
    whole = sample()
    ended = whole.has_eos.sum()
    assert 0 < ended < len(whole.has_eos)
    order = list(range(len(PROMPTS)))
    for seed in range(3):
        assert_same(sample(order, num_slots=num_slots), whole, rows_of(order))
        random.Random(seed).shuffle(order)


def test_neighbours_change_nothing(sample: Sample) -> None:
    """Each alone; some of them; each sample of a prompt alone; and again in two calls, as after a
    resume."""
    whole = sample()
    for order in ([2], [6, 0], [1, 3, 5], [4, 2, 6, 0]):
        assert_same(sample(order, num_slots=2), whole, rows_of(order))
    for row in (7, 8, 18):
        alone = sample([row // NUM_SAMPLES], num_samples=1, request_ids=[row])
        assert_same(alone, whole, [row])
    first, second = [0, 1, 2], [3, 4, 5, 6]
    assert_same(sample(first), whole, rows_of(first))
    assert_same(sample(second, num_slots=3), whole, rows_of(second))


def test_a_seed_and_a_number_are_a_draw(sample: Sample) -> None:
    whole = sample()
    other = sample(request_ids=[row + 100 for row in rows_of(range(7))])
    assert not torch.equal(other.token_ids[:, :1], whole.token_ids[:, :1])
    reseeded = sample(sampling=dataclasses.replace(SAMPLINGS["cool"], seed=99))
    assert not torch.equal(reseeded.token_ids[:, :1], whole.token_ids[:, :1])
    repeated = sample(request_ids=[5] * 21, eos_token_id=None)
    for first in range(0, 21, NUM_SAMPLES):
        rows = repeated.token_ids[first : first + NUM_SAMPLES]
        assert torch.equal(rows[0].expand_as(rows), rows)


@pytest.mark.parametrize("num_slots", [1, 3, 4, 64])
def test_prompts_are_computed_once_and_stay_while_a_sample_lives(
    num_slots: int, sample: Sample, watched: Watched
) -> None:
    sample(num_slots=num_slots)
    assert sorted(list(prompt.ids) for prompt in watched.prompts) == sorted(PROMPTS)
    assert not watched.clashes
    assert len(watched.rows) == len(PROMPTS) * NUM_SAMPLES


@pytest.mark.parametrize("num_slots", [1, 3, 64])
def test_the_longest_begin_first(num_slots: int, sample: Sample, watched: Watched) -> None:
    sample(num_slots=num_slots)
    limits = [row.limit for row in watched.rows]
    assert limits == sorted(limits, reverse=True)
    of_longest = slice(2 * NUM_SAMPLES, 3 * NUM_SAMPLES)
    numbers = [row.request_id for row in watched.rows]
    assert numbers[:NUM_SAMPLES] == rows_of(range(7))[of_longest]


def test_slots_are_filled_again_beside_live_rows(sample: Sample, watched: Watched) -> None:
    out = sample(num_slots=4)
    assert out.facts.num_slots == 4
    assert max(watched.joined) > 0, "no row ever joined others"
    assert max(watched.ages) > 1, "rows of one age only"
    assert max(row.slot for row in watched.rows) == 3
    rows, slots = len(watched.rows), [row.slot for row in watched.rows]
    assert all(slots.count(slot) > 1 for slot in range(4))
    assert rows == 21


def test_rows_that_ended_are_dropped_from_the_modules_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once they are a quarter of it; that none waits for their slots is no reason to keep them."""
    kind, sizes = choose_runner("modules", monkeypatch), []
    step = kind._step

    def watched_step(it: Any, num_rows: int) -> None:
        sizes.append(num_rows)
        step(it, num_rows)

    monkeypatch.setattr(kind, "_step", watched_step)
    limits = [4, 6, 6, 6, 6, 8, 8, 14]
    out = decode(scrambled(), [[5]] * 8, max_new_tokens=limits, sampling=SAMPLINGS["cool"])
    assert out.lengths.tolist() == limits
    assert sizes == [8] * 6 + [3] * 2 + [1] * 6


def test_the_cache_is_as_large_as_planned(model: LanguageModel, sample: Sample) -> None:
    requests = [
        PromptRequest(ids=prompt, max_new_tokens=limit, request_ids=[0] * NUM_SAMPLES)
        for prompt, limit in zip(PROMPTS, LIMITS, strict=True)
    ]
    for num_slots in (1, 4, 64):
        shape = plan_cache(model, requests, num_slots)
        assert shape.num_slots == min(num_slots, 21)
        assert (shape.capacity, shape.prompt_capacity) == (40, 30)
        assert shape.num_prompts <= min(7, num_slots)
        tokens = shape.num_slots * 40 + shape.num_prompts * 30
        a_token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, bytes
        assert shape.num_bytes(model.config, torch.float32) == tokens * a_token
        facts = sample(num_slots=num_slots).facts
        assert facts.cache_bytes == tokens * a_token
        assert facts.num_slots == shape.num_slots


@pytest.mark.skipif(why_not_measured("cpu") is not None, reason="needs /proc")
def test_what_a_cache_takes_is_what_it_says() -> None:
    shape = CacheShape(num_slots=64, capacity=900, num_prompts=32, prompt_capacity=600)
    expected = shape.num_bytes(GROUPED, torch.float32)
    assert expected > 25 << 20

    def fill() -> KVCache:
        cache = KVCache(GROUPED, shape, torch.float32, torch.device("cpu"))
        for arena in (cache.keys, cache.values, cache.prompt_keys, cache.prompt_values):
            arena.fill_(1.0)
        return cache

    assert peak_extra_bytes("cpu", fill) == pytest.approx(expected, rel=0.05)


def test_a_budget_bounds_the_slots(sample: Sample) -> None:
    whole = sample(num_slots=8)
    budget = whole.facts.cache_bytes // 2
    bounded = sample(num_slots=8, kv_budget_bytes=budget)
    assert 1 <= bounded.facts.num_slots < 8
    assert bounded.facts.cache_bytes <= budget
    assert_same(bounded, whole)
    with pytest.raises(ValueError, match=r"one request needs .* give kv_budget_bytes"):
        sample(kv_budget_bytes=1000)


def test_broken_logits_name_the_request_and_the_token(model: LanguageModel) -> None:
    """From the token on whose embedding is broken, which only one completion draws."""
    greedy = decode(model, PROMPTS, max_new_tokens=9, sampling=SAMPLINGS["greedy"])
    in_prompts = {token for prompt in PROMPTS for token in prompt}
    rows = greedy.token_ids.tolist()
    row, token = next(
        (i, token)
        for i, ids in enumerate(rows)
        for token in ids[1:8]
        if token not in in_prompts and sum(token in other for other in rows) == 1
    )
    with torch.no_grad():
        model.trunk.embed_tokens.weight[token] = torch.nan
    place = rows[row].index(token) + 1
    message = f"no distribution .*request {row + 40} at completion token {place};"
    with pytest.raises(ValueError, match=message):
        decode(
            model,
            PROMPTS,
            max_new_tokens=9,
            sampling=SAMPLINGS["greedy"],
            request_ids=range(40, 47),
            num_slots=3,
        )


def test_giving_up_leaves_nothing_behind(
    sample: Sample, runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample()
    asked, caches, init = 0, [], runner.__init__

    def watched_init(it: Any, *arguments: Any) -> None:
        init(it, *arguments)
        caches.append(weakref.ref(it._cache))

    monkeypatch.setattr(runner, "__init__", watched_init)

    def give_up() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            raise Interrupted("stop")

    done: list[int] = []
    with pytest.raises(Interrupted):
        sample(num_slots=2, on_step=give_up, on_completion=lambda c: done.append(c.index))
    assert asked == 3
    assert 0 < len(done) < 21
    assert [cache() for cache in caches] == [None]
    assert_same(sample(num_slots=2), whole)

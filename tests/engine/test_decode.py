"""The rollout: equal to transformers' generate, independent of the batch, and what it stores is
what the trainer computes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl.generation import Generation
from fuserl.interrupt import Interrupted
from fuserl.model.config import DecoderConfig
from fuserl.model.folder import save_model
from fuserl.model.heads import LanguageModel
from fuserl.model.notes import FolderNotes
from fuserl.policy import Policy, load_policy
from fuserl.rollout.decode import decode
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.native_runner import NativeRunner
from fuserl.rollout.sampling import SamplingParams

PROMPTS = [[5, 9, 3, 11, 7, 30], [8], [12, 4, 6], [9, 9, 31, 22, 10, 6, 3, 3, 5], [33, 21]]

MakeModel = Callable[..., LanguageModel]


def without_tokenizer(model: LanguageModel) -> Policy:
    return Policy(model, None, FolderNotes(), "made")


def frequent_id(out: Generation) -> int:
    """An id that really occurs early in some completions and not at once in all: a good EOS."""
    ids = [token for row in out.token_ids for token in row[1:6]]
    return max(set(ids), key=ids.count)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Each time that rows ended beside others: how many those were, which moved together."""
    seen: list[int] = []
    for kind in (NativeRunner, ModuleRunner):
        monkeypatch.setattr(kind, "run", watched(kind.run, seen))
    return seen


def watched(run: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    def watching(self: NativeRunner | ModuleRunner, *limits: int) -> Any:
        ended = run(self, *limits)
        if ended and self.rows.num_rows:
            seen.append(self.rows.num_rows)
        return ended

    return watching


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_heads": 4, "tie_embeddings": False, "qkv_bias": True, "output_bias": True},
        {"num_kv_heads": 1},
    ],
    ids=["grouped", "multi_head_untied", "one_kv_head"],
)
def test_greedy_equals_transformers_generate(
    changes: dict[str, Any], make_model: MakeModel, tmp_path: Path, moves: list[int]
) -> None:
    from transformers import AutoModelForCausalLM

    model = make_model(seed=3, **changes)
    policy = without_tokenizer(model)
    free = policy.generate(PROMPTS, max_new_tokens=24, temperature=0.0, ignore_eos=True)
    eos = frequent_id(free)
    assert len({tuple(row) for row in free.token_ids}) == len(PROMPTS)

    ours = policy.generate(PROMPTS, max_new_tokens=24, temperature=0.0, eos_token_id=eos)
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt, row in zip(PROMPTS, ours.token_ids, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=eos,
            pad_token_id=0,
        )[0, len(prompt) :]
        assert row == expected.tolist()
    lengths = [len(row) for row in ours.token_ids]
    assert min(lengths) < 16
    assert len(set(lengths)) > 1
    assert [
        row[: len(short)] for row, short in zip(free.token_ids, ours.token_ids, strict=True)
    ] == (ours.token_ids)
    assert moves, "no row ever ended beside others: the test does not reach what moves them"


def test_a_request_gets_the_same_completion_in_any_batch(
    make_model: MakeModel, moves: list[int]
) -> None:
    model = make_model(seed=1)
    numbers = [7, 3, 100, 41, 5]
    eos = frequent_id(without_tokenizer(model).generate(PROMPTS * 4, max_new_tokens=12))

    def sample(rows: list[int]) -> dict[int, tuple[list[int], list[float]]]:
        out = decode(
            model,
            [PROMPTS[row] for row in rows],
            max_new_tokens=24,
            sampling=SamplingParams(temperature=1.0, seed=9),
            eos_token_id=eos,
            request_ids=[numbers[row] for row in rows],
        )
        lengths = out.lengths.tolist()
        return {
            row: (out.token_ids[i, : lengths[i]].tolist(), out.logprobs[i, : lengths[i]].tolist())
            for i, row in enumerate(rows)
        }

    together = sample([0, 1, 2, 3, 4])
    assert len({len(ids) for ids, _ in together.values()}) > 1
    assert moves
    for rows in ([4, 2, 0, 3, 1], [1, 3], [0], [2], [3], [4, 0]):
        for row, (ids, logprobs) in sample(rows).items():
            assert ids == together[row][0], rows
            assert logprobs == pytest.approx(together[row][1], abs=1e-5)


@pytest.mark.parametrize("num_slots", [1, 4, 7, 64])
def test_slots_change_no_draw(make_model: MakeModel, num_slots: int) -> None:
    policy = without_tokenizer(make_model(seed=1))
    options: dict[str, Any] = {"max_new_tokens": 10, "n": 3, "seed": 4}
    whole = policy.generate(PROMPTS, **options, num_slots=1000)
    assert policy.generate(PROMPTS, **options, num_slots=num_slots).token_ids == whole.token_ids
    part = policy.generate(PROMPTS[2:], **options, first_request_id=6)
    assert part.token_ids == whole.token_ids[6:]


def test_samples_of_a_prompt_differ_and_stand_together(make_model: MakeModel) -> None:
    policy = without_tokenizer(make_model(seed=1))
    out = policy.generate(PROMPTS[:2], max_new_tokens=12, n=6, seed=0)
    for first in (0, 6):
        assert len({tuple(row) for row in out.token_ids[first : first + 6]}) == 6
    greedy = policy.generate(PROMPTS[:2], max_new_tokens=12, n=2, temperature=0.0)
    alone = policy.generate(PROMPTS[:2], max_new_tokens=12, temperature=0.0, seed=77)
    assert greedy.token_ids == [row for row in alone.token_ids for _ in range(2)]
    other = policy.generate(PROMPTS[:2], max_new_tokens=12, n=6, seed=1)
    assert other.token_ids != out.token_ids
    assert policy.generate(PROMPTS[:2], max_new_tokens=12, n=6, seed=0) == out


def test_an_ended_row_passes_no_table_of_positions(make_model: MakeModel) -> None:
    """It decodes on, unread, while most rows live: beyond the last learned position too."""
    policy = without_tokenizer(make_model(seed=1, rope=None, max_positions=24))
    prompts = [[3] * 20, [5], [6], [7], [8]]
    limits = [4, 20, 20, 20, 20]
    out = policy.generate(prompts, max_new_tokens=limits, temperature=0.0, ignore_eos=True)
    assert list(map(len, out.token_ids)) == limits
    for prompt, limit, row in zip(prompts, limits, out.token_ids, strict=True):
        alone = policy.generate([prompt], max_new_tokens=limit, temperature=0.0, ignore_eos=True)
        assert alone.token_ids == [row]


def test_each_prompt_has_its_own_limit(make_model: MakeModel) -> None:
    policy = without_tokenizer(make_model(seed=1))
    limits = [1, 9, 4, 2, 6]
    free = policy.generate(PROMPTS, max_new_tokens=9, ignore_eos=True)
    out = policy.generate(PROMPTS, max_new_tokens=limits, ignore_eos=True)
    assert list(map(len, out.token_ids)) == limits
    expected = [row[:limit] for row, limit in zip(free.token_ids, limits, strict=True)]
    assert out.token_ids == expected
    refilled = policy.generate(PROMPTS, max_new_tokens=limits, ignore_eos=True, num_slots=2)
    assert refilled.token_ids == expected


def test_ignore_eos_goes_on_and_eos_is_kept(make_model: MakeModel) -> None:
    policy = without_tokenizer(make_model(seed=1))
    out = policy.generate(PROMPTS * 4, max_new_tokens=24, n=2)
    ended = [row for row in out.token_ids if 2 in row]
    assert len(ended) > 3
    assert all(row.index(2) == len(row) - 1 for row in ended)
    assert all(len(row) == 24 for row in out.token_ids if 2 not in row)
    free = policy.generate(PROMPTS * 4, max_new_tokens=24, n=2, ignore_eos=True)
    assert all(len(row) == 24 for row in free.token_ids)
    assert any(2 in row[:-1] for row in free.token_ids)


def test_padding_may_be_the_eos(make_model: MakeModel) -> None:
    """Lengths tell what is real: an EOS with the padding's id 0 trains, and so does an id 0 that
    stands in a prompt."""
    model = make_model(seed=1, eos_token_id=0, pad_token_id=0)
    prompts = [[0, 5, 0], [7], [0], [4, 0]] * 6
    policy = without_tokenizer(model)
    out = policy.generate(prompts, max_new_tokens=30, seed=2)
    ended = [row for row in out.token_ids if row[-1] == 0]
    assert len(ended) > 2
    assert all(0 not in row[:-1] for row in out.token_ids)
    logprobs = policy.logprobs(prompts, out.token_ids)
    for row, stored, computed in zip(out.token_ids, out.logprobs, logprobs, strict=True):
        assert len(stored) == len(row) == len(computed)
        assert stored == pytest.approx(computed.tolist(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_stored_logprobs_equal_the_trainers_forward(
    make_model: MakeModel, temperature: float
) -> None:
    policy = without_tokenizer(make_model(seed=2))
    prompts = PROMPTS * 3
    out = policy.generate(prompts, max_new_tokens=20, temperature=temperature, seed=1)
    computed = policy.logprobs(prompts, out.token_ids, temperature=temperature)
    for stored, row in zip(out.logprobs, computed, strict=True):
        torch.testing.assert_close(torch.tensor(stored), row, rtol=1e-5, atol=1e-5)


def test_stored_logprobs_are_of_the_distribution_before_truncation(make_model: MakeModel) -> None:
    policy = without_tokenizer(make_model(seed=2))
    out = policy.generate(PROMPTS, max_new_tokens=12, top_k=3, top_p=0.9, seed=1)
    computed = policy.logprobs(PROMPTS, out.token_ids)
    for stored, row in zip(out.logprobs, computed, strict=True):
        torch.testing.assert_close(torch.tensor(stored), row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[5], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[5], [5, 40]]}, r"prompts\[1\] holds token id 40.*vocabulary of 40"),
        ({"prompts": [[-1]]}, r"prompts\[0\] holds token id -1"),
        ({"prompts": [[5]] * 6 + [[5] * 95], "num_slots": 2}, r"prompts\[6\] has 95 tokens.*96"),
        ({"max_new_tokens": 96}, r"prompts\[0\] has 6 tokens; with max_new_tokens 96"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": [4, 4]}, "max_new_tokens has 2 entries for 5 prompts"),
        ({"max_new_tokens": [4] * 6}, "max_new_tokens has 6 entries for 5 prompts"),
        ({"n": 0}, "n must be at least 1"),
        ({"num_slots": 0}, "num_slots must be at least 1"),
        ({"eos_token_id": 40}, "eos_token_id 40 is outside the vocabulary of 40"),
        ({"temperature": -1.0}, "temperature must be finite, not negative"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"prompts": ["a text"]}, "has no tokenizer: give prompts as lists of token ids"),
        ({"prompts": "a text"}, "prompts must be a list of texts"),
        ({"prompts": ["a text", [5]]}, "all texts or all token ids"),
    ],
)
def test_bad_requests_are_refused(
    options: dict[str, Any], message: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = without_tokenizer(make_model())

    def compute(*args: Any) -> None:
        raise AssertionError("a bad request must be refused before anything is computed")

    monkeypatch.setattr(policy.model, "forward", compute)
    with pytest.raises(ValueError, match=message):
        policy.generate(**{"prompts": PROMPTS, "max_new_tokens": 4, **options})


def test_no_prompts_give_no_completions(make_model: MakeModel) -> None:
    policy = without_tokenizer(make_model())
    assert policy.generate([]).token_ids == []
    assert policy.logprobs([], []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_named(make_model: MakeModel, temperature: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.trunk.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"no distribution \(NaN.*request 3.*token 0.*weights"):
        without_tokenizer(model).generate(
            PROMPTS[:1], max_new_tokens=4, temperature=temperature, first_request_id=3
        )


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[5]], [[5], [6]], "prompt_ids has 1 rows and completion_ids 2"),
        ([[5], []], [[5], [6]], "empty prompt"),
        ([[5], [99]], [[5], [6]], r"prompt_ids\[1\] holds token id 99"),
        ([[5]], [[5, -2]], r"completion_ids\[0\] holds token id -2"),
    ],
)
def test_logprobs_refuses_bad_ids(
    prompts: list[list[int]], completions: list[list[int]], message: str, make_model: MakeModel
) -> None:
    with pytest.raises(ValueError, match=message):
        without_tokenizer(make_model()).logprobs(prompts, completions)


def test_logprobs_of_an_empty_completion_are_empty(make_model: MakeModel) -> None:
    policy = without_tokenizer(make_model())
    one, none = policy.logprobs([[5, 6], [7]], [[8], []])
    assert (len(one), len(none)) == (1, 0)
    assert [len(row) for row in policy.logprobs([[5, 6], [7]], [[], []])] == [0, 0]


def test_an_interrupt_leaves_the_model_usable(make_model: MakeModel) -> None:
    model = make_model(seed=1)
    policy = without_tokenizer(model)
    before = policy.generate(PROMPTS, max_new_tokens=80)
    steps = []

    def stop_at_third() -> None:
        steps.append(1)
        if len(steps) == 3:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        decode(
            model,
            PROMPTS,
            max_new_tokens=80,
            sampling=SamplingParams(),
            eos_token_id=None,
            on_step=stop_at_third,
        )
    assert len(steps) == 3
    assert policy.generate(PROMPTS, max_new_tokens=80) == before


def test_texts_go_through_the_template(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(template="{prompt} =>")
    assert policy.tokenizer is not None
    [ids] = policy.encode(["red dog"])
    assert ids[0] == policy.tokenizer.bos_token_id
    assert policy.tokenizer.decode(ids) == "red dog =>"
    by_text = policy.generate(["red dog"], max_new_tokens=6, seed=1)
    assert by_text == policy.generate([ids], max_new_tokens=6, seed=1)
    assert by_text.texts == [policy.tokenizer.decode(by_text.token_ids[0])]


def test_a_folder_without_a_tokenizer_speaks_in_ids(
    make_model: MakeModel, sizes: DecoderConfig, tmp_path: Path
) -> None:
    model = make_model(seed=1)
    without_tokenizer(model).save(tmp_path)
    policy = load_policy(tmp_path)
    assert policy.tokenizer is None
    assert policy.eos_token_id == sizes.eos_token_id
    out = policy.generate(PROMPTS, max_new_tokens=6)
    assert out.texts is None
    assert out == without_tokenizer(model).generate(PROMPTS, max_new_tokens=6)


def test_a_vocabulary_that_does_not_fit_is_named(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    smaller = dataclasses.replace(policy.model.config, vocab_size=50)
    save_model(LanguageModel(smaller), tmp_path)
    assert policy.tokenizer is not None
    policy.tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, but vocab_size.*is 50"):
        load_policy(tmp_path)

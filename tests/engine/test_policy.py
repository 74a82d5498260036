"""What a policy says: where completions stop, what is told of them, and how they come out one by
one."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import other_models
import pytest
import torch
from folders import edit_json

import fuserl_kernels as fk
from fuserl.generation import FinishedCompletion, Generation
from fuserl.model.folder import load_language_model
from fuserl.model.heads import LanguageModel
from fuserl.model.notes import FolderNotes
from fuserl.policy import Policy, load_policy
from fuserl.rollout.engine import RolloutFacts
from fuserl.tokenizer import Tokenizer

MakePolicy = Callable[..., Policy]
MakeModel = Callable[..., LanguageModel]

TEXTS = ["red dog", "big house tree", "old", "blue green cat runs", "small"]
NUM_TOKENS = 24


def reciting(make_policy: MakePolicy, tokenizer: Tokenizer, prompt: str, text: str) -> Policy:
    """A policy whose greedy completion of `prompt` is `text`, then the EOS for ever: each token
    has one successor, so none may come twice."""
    chain = [tokenizer.encode_text(prompt)[-1], *tokenizer.encode_text(text)]
    chain.append(tokenizer.eos_token_id)
    assert len(set(chain)) == len(chain)
    policy = make_policy(hidden_size=64, tie_embeddings=False)
    model = policy.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.trunk.norm.weight.fill_(1.0)
        for i, (token, successor) in enumerate(zip(chain, [*chain[1:], chain[-1]], strict=True)):
            model.trunk.embed_tokens.weight[token, i] = 1.0
            model.lm_head.weight[successor, i] = 4.0
    return policy


def recited(policy: Policy, prompt: str, **options: Any) -> tuple[str | None, int, str]:
    """Text, number of tokens and finish reason of the greedy completion."""
    options = {"max_new_tokens": 40, "temperature": 0.0, **options}
    out = policy.generate([prompt], **options)
    assert out.texts is not None
    return out.texts[0], len(out.token_ids[0]), out.finish_reasons[0]


def free(policy: Policy, n: int = 2, **options: Any) -> Generation:
    """Sampled completions that nothing ends."""
    return policy.generate(TEXTS, max_new_tokens=NUM_TOKENS, n=n, ignore_eos=True, **options)


def length_with(tokenizer: Tokenizer, token_ids: list[int], stop: list[str]) -> int | None:
    """Tokens after which the text first holds one of the strings, tried from the front."""
    for length in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:length])
        if any(string in text for string in stop):
            return length
    return None


@pytest.fixture(params=["default", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every runner of this machine."""
    if request.param == "default":
        yield
    else:
        with fk.use_backend("reference"):
            yield


@pytest.mark.parametrize("num_slots", [None, 1, 3])
@pytest.mark.usefixtures("backend")
def test_stop_strings_end_a_completion_where_its_text_first_holds_one(
    num_slots: int | None, make_policy: MakePolicy, tokenizer: Tokenizer
) -> None:
    """Against a search of the whole completions, which stopping leaves as they were up to there.
    The strings are of one token, of parts of two, of three, and with a space at an end."""
    policy = make_policy(seed=4)
    whole = free(policy)
    assert whole.texts is not None
    pieces = [[tokenizer.decode([i]) for i in row] for row in whole.token_ids]
    readable = [(row, t) for row in pieces for t in range(3, 20) if "\ufffd" not in "".join(row)]
    readable = readable or [(row, t) for row in pieces for t in range(3, 20)]
    sets = [
        ["e"],
        [" "],
        ["dog "],
        [" cat", "tree "],
        ["ru", "us"],
        [readable[0][0][5] + readable[0][0][6][:1]],
        [readable[-1][0][8][-1:] + readable[-1][0][9] + readable[-1][0][10][:1]],
    ]
    ended = 0
    for stop in sets:
        out = free(policy, stop=stop, num_slots=num_slots)
        assert out.texts is not None
        for i, row in enumerate(whole.token_ids):
            length = length_with(tokenizer, row, stop)
            assert out.token_ids[i] == row[:length], stop
            assert out.logprobs[i] == pytest.approx(whole.logprobs[i][:length], abs=1e-5)
            assert out.finish_reasons[i] == ("length" if length is None else "stop")
            text = tokenizer.decode(row[:length])
            expected = min((text.partition(string)[0] for string in stop), key=len)
            assert out.texts[i] == expected
            ended += length is not None
    assert ended > len(sets), "hardly anything was stopped: the strings are badly chosen"


def test_a_stop_string_may_span_tokens(make_policy: MakePolicy, tokenizer: Tokenizer) -> None:
    policy = reciting(make_policy, tokenizer, "red", " dog cat runs")
    assert recited(policy, "red") == (" dog cat runs", 4, "stop")
    assert recited(policy, "red", stop="g c") == (" do", 2, "stop")
    assert recited(policy, "red", stop=["cat r", "nowhere"]) == (" dog ", 3, "stop")
    assert recited(policy, "red", stop=["runs", "t r"]) == (" dog ca", 3, "stop")
    assert recited(policy, "red", stop="nowhere") == (" dog cat runs", 4, "stop")
    assert recited(policy, "red", stop="runs", max_new_tokens=2) == (" dog cat", 2, "length")
    assert recited(policy, "red", ignore_eos=True, max_new_tokens=9)[1:] == (9, "length")


def test_a_stop_string_may_end_in_a_space(make_policy: MakePolicy, tokenizer: Tokenizer) -> None:
    """The space is the beginning of the following token."""
    policy = reciting(make_policy, tokenizer, "red", " dog cat runs")
    assert recited(policy, "red", stop="dog ") == (" ", 2, "stop")
    assert recited(policy, "red", stop="runs ") == (" dog cat runs", 4, "stop")
    assert recited(policy, "red", stop=" ") == ("", 1, "stop")


def test_a_stop_string_in_the_prompt_does_not_count(
    make_policy: MakePolicy, tokenizer: Tokenizer
) -> None:
    policy = reciting(make_policy, tokenizer, "big cat", " dog runs")
    for stop in ("cat", "big cat", "cat dog", "t d"):
        assert recited(policy, "big cat", stop=stop) == (" dog runs", 3, "stop")
    assert recited(policy, "red big dog big cat", stop="dog") == (" ", 1, "stop")


def test_a_stop_string_may_have_characters_of_several_tokens(
    make_policy: MakePolicy, tokenizer: Tokenizer
) -> None:
    text = " né€!"
    tokens = tokenizer.encode_text(text)
    assert len(tokens) > len(text), "the characters are single tokens"
    policy = reciting(make_policy, tokenizer, "red", text)
    ids = tokenizer.encode_text
    assert recited(policy, "red", stop="é") == (" n", len(ids(" né")), "stop")
    assert recited(policy, "red", stop="€") == (" né", len(ids(" né€")), "stop")
    assert recited(policy, "red", stop="né€!") == (" ", len(tokens), "stop")
    assert recited(policy, "red", stop="è") == (text, len(tokens) + 1, "stop")


def test_stop_token_ids_end_beside_the_eos(make_policy: MakePolicy, tokenizer: Tokenizer) -> None:
    policy = reciting(make_policy, tokenizer, "red", " dog cat runs")
    _, cat, runs = tokenizer.encode_text(" dog cat runs")
    assert recited(policy, "red", stop_token_ids=[runs, cat]) == (" dog cat", 2, "stop")
    assert recited(policy, "red", stop_token_ids=[cat], ignore_eos=True)[1:] == (2, "stop")
    assert recited(policy, "red", stop_token_ids=[5]) == (" dog cat runs", 4, "stop")
    assert recited(policy, "red", eos_token_id=runs) == (" dog cat runs", 3, "stop")
    assert recited(policy, "red", stop="cat", stop_token_ids=[cat]) == (" dog ", 2, "stop")


def test_all_ids_that_a_folder_lists_end_a_completion(
    make_policy: MakePolicy, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    reciting(make_policy, tokenizer, "red", " dog cat runs").save(tmp_path)
    eos = tokenizer.eos_token_id
    _, cat, runs = tokenizer.encode_text(" dog cat runs")
    plain = load_policy(tmp_path)
    assert plain.eos_token_ids == {eos}
    assert recited(plain, "red")[1] == 4

    generation = tmp_path / "generation_config.json"
    edit_json(generation, eos_token_id=[eos, cat, 100_000, -1])
    policy = load_policy(tmp_path)
    assert (policy.eos_token_id, policy.eos_token_ids) == (eos, {eos, cat})
    assert recited(policy, "red") == (" dog cat", 2, "stop")
    assert recited(policy, "red", eos_token_id=runs)[1] == 3
    assert recited(policy, "red", ignore_eos=True, max_new_tokens=6)[1:] == (6, "length")
    policy.save(tmp_path / "again")
    assert load_policy(tmp_path / "again").eos_token_ids == {eos, cat}

    edit_json(tmp_path / "config.json", eos_token_id=[runs, eos])
    assert load_policy(tmp_path).eos_token_ids == {eos, cat}, "generation_config.json goes first"
    generation.unlink()
    assert load_policy(tmp_path).eos_token_ids == {eos, runs}
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    assert load_policy(tmp_path).eos_token_ids == {eos, runs}


def test_all_ids_of_a_model_that_runs_through_transformers(tmp_path: Path) -> None:
    other_models.build("olmo2").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit_json(tmp_path / "config.json", eos_token_id=[2, 9])
    policy = Policy(load_language_model(tmp_path), None, FolderNotes(), "made")
    assert policy.eos_token_ids == {2, 9}


@pytest.mark.usefixtures("backend")
def test_samples_stop_each_for_itself(make_policy: MakePolicy, tokenizer: Tokenizer) -> None:
    policy = make_policy(seed=4)
    whole = free(policy, n=5)
    out = free(policy, n=5, stop="e", num_slots=4)
    lengths = [length_with(tokenizer, row, ["e"]) for row in whole.token_ids]
    expected = [row[:length] for row, length in zip(whole.token_ids, lengths, strict=True)]
    assert out.token_ids == expected
    assert len({len(row) for row in expected}) > 3


def test_what_is_told_of_a_completion(make_policy: MakePolicy) -> None:
    policy = make_policy(seed=4)
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "top_k": 5, "temperature": 0.9}
    drawn = [i for row in policy.generate(TEXTS, **options).token_ids for i in row]
    eos = max(set(drawn), key=drawn.count)
    out = policy.generate(TEXTS, **options, eos_token_id=eos)
    assert out.finish_reasons == ["stop" if row[-1] == eos else "length" for row in out.token_ids]
    assert set(out.finish_reasons) == {"stop", "length"}
    for row, logprobs, truncated in zip(
        out.token_ids, out.logprobs, out.truncated_logprobs, strict=True
    ):
        assert len(row) == len(logprobs) == len(truncated)
        assert all(kept > whole for kept, whole in zip(truncated, logprobs, strict=True))
    greedy = policy.generate(TEXTS, max_new_tokens=4, temperature=0.0)
    assert all(value == 0.0 for row in greedy.truncated_logprobs for value in row)
    config, slots = policy.model.config, len(TEXTS)
    longest = max(map(len, policy.encode(TEXTS)))
    token_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    assert greedy.kv_bytes == token_bytes * slots * (4 + longest)
    assert free(policy, num_slots=1).kv_bytes == token_bytes * (NUM_TOKENS + longest)


def test_the_budget_for_keys_bounds_the_slots_and_changes_no_draw(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy(seed=4)
    whole, facts = free(policy), RolloutFacts()
    budget = whole.kv_bytes // 3
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "n": 2, "ignore_eos": True}
    small = list(policy.stream(TEXTS, **options, kv_budget_bytes=budget, facts=facts))
    assert 1 <= facts.num_slots < 2 * len(TEXTS)
    assert 0 < facts.cache_bytes <= budget
    assert {c.index: c.token_ids for c in small} == dict(enumerate(whole.token_ids))
    with pytest.raises(ValueError, match=r"and the budget is 10: .*kv_budget_bytes"):
        free(policy, kv_budget_bytes=10)


@pytest.mark.usefixtures("backend")
def test_a_stream_gives_every_completion_once_as_it_finishes(make_policy: MakePolicy) -> None:
    policy = make_policy(seed=4)
    options: dict[str, Any] = {"max_new_tokens": [20, 3, 9, 4, 14], "n": 2, "ignore_eos": True}
    whole = policy.generate(TEXTS, **options)
    assert whole.texts is not None
    streamed = list(policy.stream(TEXTS, **options, num_slots=3))
    order = [completion.index for completion in streamed]
    assert sorted(order) == list(range(10))
    assert order != sorted(order)
    together = [completion.index for completion in policy.stream(TEXTS, **options)]
    assert set(together[-2:]) == {0, 1}, "what is longest ends last where all begin together"
    for completion in streamed:
        i = completion.index
        assert completion == FinishedCompletion(
            index=i,
            prompt_index=i // 2,
            token_ids=whole.token_ids[i],
            logprobs=pytest.approx(whole.logprobs[i], abs=1e-5),
            truncated_logprobs=pytest.approx(whole.truncated_logprobs[i], abs=1e-5),
            text=whole.texts[i],
            finish_reason="length",
        )


def test_a_stream_computes_as_it_is_drawn_from(make_policy: MakePolicy) -> None:
    policy = make_policy(seed=4)
    steps: list[int] = []
    options: dict[str, Any] = {"max_new_tokens": NUM_TOKENS, "num_slots": 1, "ignore_eos": True}
    stream = policy.stream(TEXTS, **options, on_step=lambda: steps.append(1))
    assert not steps
    first = next(stream)
    begun = len(steps)
    assert begun > 0
    rest = list(stream)
    assert len(steps) == len(TEXTS) * begun
    assert [first, *rest] == list(policy.stream(TEXTS, **options))

    given_up = policy.stream(TEXTS, **options)
    next(given_up)
    given_up.close()  # type: ignore[attr-defined]
    assert next(policy.stream(TEXTS, **options)) == first
    assert list(policy.stream([])) == []


def test_wrong_stops_are_refused_at_once(make_policy: MakePolicy, make_model: MakeModel) -> None:
    policy = make_policy()
    dumb = Policy(make_model(), None, FolderNotes(), "made")
    vocab_size = policy.model.config.vocab_size

    def refused(message: str, speaker: Policy = policy, **options: Any) -> None:
        prompts = [[5]] if speaker is dumb else ["red"]
        for call in (speaker.generate, speaker.stream):
            with pytest.raises(ValueError, match=message):
                call(prompts, **options)

    refused("stop strings need a tokenizer: give stop_token_ids", dumb, stop="dog")
    refused("stop must not hold an empty string", stop=["dog", ""])
    refused("stop must not hold an empty string", stop="")
    refused(f"stop_token_ids {vocab_size} is outside the vocabulary", stop_token_ids=[vocab_size])
    refused("stop_token_ids -1 is outside the vocabulary", stop_token_ids=[4, -1])
    refused("stop_token_ids 40 is outside the vocabulary of 40", dumb, stop_token_ids=[40])
    refused("holds the special token '</s>'.* id 2 in stop_token_ids", stop=["dog", "</s>\n"])
    refused("n must be at least 1, got 0", n=0)
    refused("num_slots must be at least 1, got 0", num_slots=0)
    assert dumb.generate([[5]], max_new_tokens=3, stop_token_ids=[7], n=4).texts is None


def test_a_saved_policy_stops_where_the_policy_did(make_policy: MakePolicy, tmp_path: Path) -> None:
    """Where tokenizer and configuration disagree, both ids end a completion."""
    policy = make_policy(eos_token_id=7)
    policy.save(tmp_path)
    assert policy.eos_token_ids == load_policy(tmp_path).eos_token_ids == {2, 7}

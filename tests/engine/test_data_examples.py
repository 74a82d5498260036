"""The loaders: ids as sampling would see them, and every row kept or counted."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from fuserl.data import (
    Counts,
    DataError,
    load_completions,
    load_prompts,
    load_rankings,
)
from fuserl.data.batching import pad_rows
from fuserl.tokenizer import Tokenizer, train_tokenizer

TLDR = "{prompt}\nTL;DR:"
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes only, so a letter is a token; prompts begin with a BOS."""
    return train_tokenizer([], 259)


@pytest.fixture(scope="module")
def bare() -> Tokenizer:
    """Bytes and an EOS: neither BOS nor pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))


def test_prompt_completion_ids(tokenizer: Tokenizer) -> None:
    examples, counts = load_completions(
        [{"prompt": "ab", "completion": " c"}], tokenizer, max_length=10
    )
    (example,) = examples
    assert example.prompt_ids == (BOS, *tokenizer.encode_text("ab"))
    assert example.completion_ids == (*tokenizer.encode_text(" c"), EOS)
    assert example.where == "data[0]"
    assert counts == Counts(rows=1, kept=1)
    with pytest.raises(FrozenInstanceError):
        example.where = "elsewhere"  # type: ignore[misc]


def test_completion_is_encoded_apart_from_its_prompt() -> None:
    """Where joint encoding would merge across the border, sampling could not."""
    tokenizer = train_tokenizer(["abab"] * 10, 262)
    assert len(tokenizer.encode_text("ab")) == 1
    examples, _ = load_completions([{"prompt": "a", "completion": "b"}], tokenizer, max_length=9)
    assert examples[0].prompt_ids == (BOS, *tokenizer.encode_text("a"))
    assert examples[0].completion_ids == (*tokenizer.encode_text("b"), EOS)


def test_text_rows_begin_with_bos_or_their_first_token(
    tokenizer: Tokenizer, bare: Tokenizer
) -> None:
    data = [{"text": "abc"}]
    (example,), counts = load_completions(data, tokenizer, max_length=5)
    assert example.prompt_ids == (BOS,)
    assert example.completion_ids == (*tokenizer.encode_text("abc"), EOS)
    assert counts.bos_prompts == 0  # a text has no prompt that could be empty
    (example,), _ = load_completions(data, bare, max_length=4)
    a, b, c = bare.encode_text("abc")
    assert example.prompt_ids == (a,)
    assert example.completion_ids == (b, c, bare.eos_token_id)
    (example,), _ = load_completions([{"text": "<s>abc"}], tokenizer, max_length=5)
    assert (*example.prompt_ids, *example.completion_ids).count(BOS) == 1


def test_an_eos_in_the_text_is_not_doubled(tokenizer: Tokenizer) -> None:
    examples, _ = load_completions(
        [
            {"prompt": "a", "completion": "b</s>"},
            {"prompt": "a", "completion": "b"},
            {"text": "b</s>"},
            {"messages": [{"role": "user", "content": "b"}]},
        ],
        tokenizer.with_chat_template("{{ bos_token + messages[0]['content'] + eos_token + '\n' }}"),
        max_length=10,
    )
    assert {example.completion_ids for example in examples} == {(*tokenizer.encode_text("b"), EOS)}


def test_chat_ids_follow_the_rendering_alone(tokenizer: Tokenizer) -> None:
    prompt = [{"role": "user", "content": "q"}]
    data = [{"prompt": prompt, "completion": [{"role": "assistant", "content": "r"}], "k": 1}]
    rendered = tokenizer.render_chat(prompt, True)
    (example,), _ = load_completions(data, tokenizer, max_length=99, prompt_template=TLDR)
    assert list(example.prompt_ids) == tokenizer.encode_text(rendered)  # no template, one BOS
    assert list(example.completion_ids) == [*tokenizer.encode_text(" r\n"), EOS]
    (only,), _ = load_prompts(data, tokenizer, max_prompt_length=99, prompt_template=TLDR)
    assert (only.ids, only.text) == (example.prompt_ids, rendered)
    assert only.columns == {"completion": data[0]["completion"], "k": 1}


def test_prompt_template_surrounds_plain_prompts(tokenizer: Tokenizer) -> None:
    template = "Sum up: {prompt}\nTL;DR:"
    (prompt,), _ = load_prompts(
        [{"prompt": "doc", "id": 3}], tokenizer, max_prompt_length=99, prompt_template=template
    )
    assert prompt.text == "doc"  # reward functions see the row's own text
    assert list(prompt.ids) == tokenizer.encode_prompt("Sum up: doc") + tokenizer.encode_text(
        "\nTL;DR:"
    )
    assert prompt.columns == {"id": 3}


@pytest.mark.parametrize("template", ["TL;DR:", "{prompt} {prompt}", "{Prompt}"])
def test_prompt_template_needs_one_prompt(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(ValueError, match=r"\{prompt\} exactly once"):
        load_prompts([{"prompt": "a"}], tokenizer, max_prompt_length=9, prompt_template=template)


@pytest.mark.parametrize(("name", "value"), [("max_length", 0), ("over_long", "drop")])
def test_wrong_options(tokenizer: Tokenizer, name: str, value: Any) -> None:
    options: dict[str, Any] = {"max_length": 9, name: value}
    with pytest.raises(ValueError, match="maximum length" if value == 0 else "over_long"):
        load_completions([{"text": "a"}], tokenizer, **options)


def test_over_long_prompts_are_filtered_or_truncated(tokenizer: Tokenizer) -> None:
    data = [{"prompt": "abcdef"}, {"prompt": "ab"}]
    tail = len("\nTL;DR:")
    options: dict[str, Any] = {"max_prompt_length": 4 + tail, "prompt_template": TLDR}
    (kept,), counts = load_prompts(data, tokenizer, **options)
    assert counts == Counts(rows=2, kept=1, over_long=1)
    assert kept.where == "data[1]"
    (cut, kept), counts = load_prompts(data, tokenizer, over_long="truncate", **options)
    assert counts == Counts(rows=2, kept=2, truncated=1)
    assert list(cut.ids) == tokenizer.encode_prompt("abc") + tokenizer.encode_text("\nTL;DR:")
    assert cut.text == "abcdef"
    assert len(kept.ids) == 3 + tail


def test_truncation_keeps_the_whole_completion_and_its_eos(tokenizer: Tokenizer) -> None:
    data = [{"prompt": "abcdef", "completion": "xyz"}]
    for max_length in (11, 10, 6):  # BOS + 6 + 3 + EOS; one letter less; one letter left
        (example,), counts = load_completions(
            data, tokenizer, max_length=max_length, over_long="truncate"
        )
        assert len(example.prompt_ids) + len(example.completion_ids) == max_length
        assert list(example.prompt_ids) == tokenizer.encode_prompt("abcdef")[: max_length - 4]
        assert example.completion_ids == (*tokenizer.encode_text("xyz"), EOS)
        assert counts.truncated == (max_length < 11)
    with pytest.raises(DataError, match="1 row: 0 kept, 1 over-long dropped; raise the maximum"):
        load_completions(data, tokenizer, max_length=5, over_long="truncate")


def test_what_has_no_document_is_never_cut(tokenizer: Tokenizer) -> None:
    keep = {"prompt": "a", "completion": "b"}
    chat = {"prompt": [{"role": "user", "content": "abcdef"}]}
    for long in ({"text": "abcdefgh"}, {**chat, "completion": [{"role": "r", "content": "x"}]}):
        chat_tokenizer = tokenizer.with_chat_template(
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        )
        _, counts = load_completions(
            [keep, long], chat_tokenizer, max_length=4, over_long="truncate"
        )
        assert counts == Counts(rows=2, kept=1, over_long=1)
    with pytest.raises(DataError, match="over-long"):
        load_prompts([chat], tokenizer, max_prompt_length=5, over_long="truncate")


def test_the_longest_completion_decides_for_a_ranking(tokenizer: Tokenizer) -> None:
    data = [{"prompt": "abcd", "chosen": "x", "rejected": "yyyy"}]
    (example,), _ = load_rankings(data, tokenizer, max_length=10)
    assert len(example.prompt_ids) + max(map(len, example.completions)) == 10
    with pytest.raises(DataError, match='over_long="truncate"'):
        load_rankings(data, tokenizer, max_length=9)
    (example,), counts = load_rankings(data, tokenizer, max_length=9, over_long="truncate")
    assert list(example.prompt_ids) == tokenizer.encode_prompt("abc")
    assert counts.truncated == 1


def test_bad_rows_are_named_or_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps({"prompt": "a", "completion": "b"})
    path.write_text("\n".join([good, "{broken", '{"prompt": "a"}', '{"text": 5}', good]))
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        load_completions(path, tokenizer, max_length=9)
    examples, counts = load_completions(path, tokenizer, max_length=9, skip_bad_rows=True)
    assert [example.where for example in examples] == [f"{path}:1", f"{path}:5"]
    assert counts == Counts(rows=5, kept=2, bad_rows=3)
    path.write_text('{"prompt": "a"}\n{"answer": "a"}')
    with pytest.raises(DataError, match=r"a\.jsonl:1: expected one of .*; found \{prompt\}"):
        load_completions(path, tokenizer, max_length=9)
    with pytest.raises(DataError, match=r"a\.jsonl: no row is left: .*2 bad skipped; load without"):
        load_completions(path, tokenizer, max_length=9, skip_bad_rows=True)


def test_a_missing_chat_template_is_not_a_bad_row(bare: Tokenizer) -> None:
    data = [{"prompt": [{"role": "user", "content": "a"}]}]
    with pytest.raises(ValueError, match="--chat-template"):
        load_prompts(data, bare, max_prompt_length=9, skip_bad_rows=True)


def test_empty_prompts_become_bos_or_are_dropped(tokenizer: Tokenizer, bare: Tokenizer) -> None:
    data = [{"prompt": ""}, {"prompt": "a"}]
    (first, _), counts = load_prompts(data, tokenizer, max_prompt_length=20)
    assert first.ids == (BOS,)
    assert counts == Counts(rows=2, kept=2, bos_prompts=1)
    for options in ({"tokenizer": bare}, {"tokenizer": tokenizer, "prompt_template": TLDR}):
        _, counts = load_prompts(data, max_prompt_length=20, **options)  # type: ignore[arg-type]
        assert counts == Counts(rows=2, kept=1, empty=1)
    (example,), counts = load_completions(
        [{"prompt": "", "completion": "b"}], tokenizer, max_length=9
    )
    assert example.prompt_ids == (BOS,)
    assert counts.bos_prompts == 1
    _, counts = load_rankings([{"chosen": "yes", "rejected": "no"}], tokenizer, max_length=9)
    assert counts.bos_prompts == 1


def test_empty_completions_are_dropped(tokenizer: Tokenizer, bare: Tokenizer) -> None:
    full = {"prompt": "a", "completion": "b"}
    for empty in (
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": "</s>"},
        {"text": ""},
        {"prompt": [{"role": "user", "content": "a"}], "completion": []},
    ):
        _, counts = load_completions([full, empty], tokenizer, max_length=9)
        assert counts == Counts(rows=2, kept=1, empty=1)
    with pytest.raises(DataError, match="1 empty dropped; check that prompts"):
        load_completions([{"text": ""}], bare, max_length=9)


def test_equal_pairs_are_dropped(tokenizer: Tokenizer) -> None:
    pairs = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "b</s>"},  # equal once tokenised
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": "a", "chosen": "", "rejected": ""},
    ]
    (example,), counts = load_rankings(pairs, tokenizer, max_length=9)
    assert counts == Counts(rows=5, kept=1, equal_pairs=2, empty=2)
    assert example.completions == tuple((*tokenizer.encode_text(text), EOS) for text in "bc")
    with pytest.raises(DataError, match="1 with equal completions dropped"):
        load_rankings(pairs[1:2], tokenizer, max_length=9)


def test_repeated_completions_of_a_ranking(tokenizer: Tokenizer) -> None:
    data = [
        {"prompt": "a", "ranked": ["b", "c", "b", "", "d"]},
        {"prompt": "a", "ranked": ["b", "b", "b"]},
    ]
    (example,), counts = load_rankings(data, tokenizer, max_length=9)
    assert example.completions == tuple((*tokenizer.encode_text(text), EOS) for text in "bcd")
    assert counts == Counts(rows=2, kept=1, equal_pairs=1, dropped_completions=2)


def test_without_a_pad_token_the_lengths_mask(bare: Tokenizer) -> None:
    """Pad equals EOS here: each trained EOS survives, which no comparison with the pad id does."""
    assert bare.pad_token_id == bare.eos_token_id
    examples, _ = load_completions(
        [{"prompt": "a", "completion": "b" * count} for count in (1, 4)], bare, max_length=9
    )
    ids, lengths = pad_rows([example.completion_ids for example in examples], bare.pad_token_id)
    assert lengths.tolist() == [2, 5]
    for row, length, example in zip(ids, lengths, examples, strict=True):
        assert tuple(row[:length].tolist()) == example.completion_ids
        assert row[length - 1] == bare.eos_token_id


def test_prompts_need_no_eos(bare: Tokenizer) -> None:
    hf = PreTrainedTokenizerFast(tokenizer_object=bare._backend)
    (prompt,), _ = load_prompts([{"prompt": "a"}], Tokenizer(hf), max_prompt_length=9)
    assert list(prompt.ids) == bare.encode_text("a")
    with pytest.raises(ValueError, match="no EOS"):
        load_completions([{"text": "a"}], Tokenizer(hf), max_length=9)


def test_summary() -> None:
    counts = Counts(rows=11_970, kept=11_801, over_long=169)
    assert counts.summary() == "11,970 rows: 11,801 kept, 169 over-long dropped"
    assert Counts(rows=1, kept=1, truncated=1).summary() == "1 row: 1 kept, 1 truncated"


SHORT = st.text(alphabet="ab ", max_size=6)


@settings(deadline=None, max_examples=60)
@given(
    pairs=st.lists(st.tuples(SHORT, SHORT, SHORT), min_size=1, max_size=12),
    max_length=st.integers(4, 14),
    over_long=st.sampled_from(["filter", "truncate"]),
)
def test_every_row_is_kept_or_counted(
    tokenizer: Tokenizer, pairs: list[tuple[str, str, str]], max_length: int, over_long: Any
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "a"}
    data = [good, *({"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs)]
    examples, counts = load_rankings(data, tokenizer, max_length=max_length, over_long=over_long)
    assert counts.rows == len(data)
    assert counts.kept == len(examples)
    dropped = counts.bad_rows + counts.over_long + counts.empty + counts.equal_pairs
    assert counts.kept + dropped == counts.rows
    for example in examples:
        assert example.prompt_ids[0] == BOS
        assert len(set(example.completions)) == len(example.completions) >= 2
        for completion in example.completions:
            assert completion[-1] == EOS
            assert completion.count(EOS) == 1
            assert len(example.prompt_ids) + len(completion) <= max_length

"""Each of TRL's row formats to text, plain and conversational, and what is wrong with others."""

from typing import Any

import pytest

from fuserl.data.formats import (
    CompletionText,
    PromptText,
    RankingText,
    parse_completion,
    parse_prompt,
    parse_ranking,
)
from fuserl.data.rows import DataError, Row
from fuserl.tokenizer import Tokenizer, train_tokenizer

# The end-of-turn marker is the EOS and a line break follows it, as in many published models.
MARKED_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# The generation prompt is not how an assistant message begins.
MISMATCHED_TEMPLATE = MARKED_TEMPLATE.replace("{{ '[assistant]' }}", "{{ '[assistant]<think>' }}")


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def row(**fields: Any) -> Row:
    return Row(fields, "f:7")


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return train_tokenizer(["a b"], 259)


@pytest.fixture(scope="module")
def marked(plain: Tokenizer) -> Tokenizer:
    return plain.with_chat_template(MARKED_TEMPLATE)


def test_language_modelling(plain: Tokenizer, marked: Tokenizer) -> None:
    assert parse_completion(row(text="a b"), plain) == CompletionText(None, "a b", False, "f:7")
    messages = row(messages=[user("q"), assistant("r")])
    assert parse_completion(messages, plain) == CompletionText(
        None, "<s>user: q\nassistant: r\n", True, "f:7"
    )
    assert parse_completion(messages, marked).completion == "[user]q</s>\n[assistant]r</s>"


def test_prompt_completion(plain: Tokenizer, marked: Tokenizer) -> None:
    standard = row(prompt="a", completion=" b", other=1)
    assert parse_completion(standard, plain) == CompletionText("a", " b", False, "f:7")
    chat = row(prompt=[user("q")], completion=[assistant("r")])
    assert parse_completion(chat, plain) == CompletionText(
        "<s>user: q\nassistant:", " r\n", True, "f:7"
    )
    assert parse_completion(chat, marked) == CompletionText(
        "[user]q</s>\n[assistant]", "r</s>", True, "f:7"
    )


def test_several_turns_keep_the_inner_eos(marked: Tokenizer) -> None:
    chat = row(prompt=[user("q")], completion=[assistant("r"), user("s"), assistant("t")])
    assert parse_completion(chat, marked).completion == "r</s>\n[user]s</s>\n[assistant]t</s>"


def test_preference(plain: Tokenizer, marked: Tokenizer) -> None:
    standard = row(prompt="a", chosen=" b", rejected=" c")
    assert parse_ranking(standard, plain) == RankingText("a", (" b", " c"), False, "f:7")
    chat = row(prompt=[user("q")], chosen=[assistant("r")], rejected=[assistant("s")])
    assert parse_ranking(chat, marked) == RankingText(
        "[user]q</s>\n[assistant]", ("r</s>", "s</s>"), True, "f:7"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("Q: x\n\nA: yes", "Q: x\n\nA: no", ("Q: x\n\nA:", " yes", " no")),
        ("one two three", "one two", ("one", " two three", " two")),
        ("same text", "same text", ("same", " text", " text")),
        ("yes", "no", ("", "yes", "no")),
        ("", "a b", ("", "", "a b")),
    ],
)
def test_implicit_prompt_in_text(
    plain: Tokenizer, chosen: str, rejected: str, expected: tuple[str, str, str]
) -> None:
    parsed = parse_ranking(row(chosen=chosen, rejected=rejected), plain)
    assert (parsed.prompt, *parsed.completions) == expected


def test_implicit_prompt_in_messages(marked: Tokenizer) -> None:
    shared = [user("q"), assistant("r"), user("s")]
    expected = marked.render_chat(shared, True)
    parsed = parse_ranking(
        row(chosen=[*shared, assistant("t")], rejected=[*shared, assistant("u")]), marked
    )
    assert parsed == RankingText(expected, ("t</s>", "u</s>"), True, "f:7")
    same = [*shared, assistant("t")]
    parsed = parse_ranking(row(chosen=same, rejected=same), marked)
    assert parsed.completions == ("t</s>", "t</s>")  # equal: the loader drops and counts it
    with pytest.raises(DataError, match="f:7: the prompt has no messages"):
        parse_ranking(row(chosen=[assistant("t")], rejected=[assistant("u")]), marked)
    with pytest.raises(DataError, match="f:7: the prompt has no messages"):
        parse_ranking(row(chosen=[], rejected=[]), marked)


def test_ranking(plain: Tokenizer, marked: Tokenizer) -> None:
    parsed = parse_ranking(row(prompt="a", ranked=["x", "y", "z"]), plain)
    assert parsed == RankingText("a", ("x", "y", "z"), False, "f:7")
    chat = row(prompt=[user("q")], ranked=[[assistant("x")], [assistant("y")]])
    assert parse_ranking(chat, marked).completions == ("x</s>", "y</s>")


def test_prompt_only_keeps_the_other_keys(plain: Tokenizer, marked: Tokenizer) -> None:
    parsed = parse_prompt(row(prompt="a", completion="b", answer=4), plain)
    assert parsed == PromptText("a", {"completion": "b", "answer": 4}, False, "f:7")
    parsed = parse_prompt(row(prompt=[user("q")], answer=4), marked)
    assert parsed == PromptText("[user]q</s>\n[assistant]", {"answer": 4}, True, "f:7")


def test_empty_chat_completions_are_empty_text(marked: Tokenizer) -> None:
    for completion in ([], [assistant("")]):
        parsed = parse_completion(row(prompt=[user("q")], completion=completion), marked)
        assert parsed.completion == ""


@pytest.mark.parametrize(
    ("parse", "expected"),
    [
        (parse_completion, "{prompt, completion} | {messages} | {text}"),
        (parse_ranking, "{prompt, ranked} | {prompt, chosen, rejected} | {chosen, rejected}"),
        (parse_prompt, "{prompt}"),
    ],
)
def test_missing_keys_are_named(plain: Tokenizer, parse: Any, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(row(question="a", answer="b"), plain)
    assert str(caught.value) == (
        f"f:7: expected one of the key sets {expected}; found {{question, answer}}"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": 3}, "text must be a string, not int"),
        ({"messages": "hello"}, "messages must be .* a list of messages, not str"),
        ({"prompt": None, "completion": "a"}, "prompt must be .*not NoneType"),
        ({"prompt": "a", "completion": 1.5}, "completion must be .*not float"),
        ({"prompt": "a", "completion": [assistant("b")]}, "all strings or all lists"),
        ({"prompt": [user("a")], "completion": "b"}, "all strings or all lists"),
        ({"prompt": [], "completion": [assistant("b")]}, "the prompt has no messages"),
        ({"prompt": ["a"], "completion": []}, r"prompt\[0\] must be a message"),
        ({"prompt": [{"role": "user"}], "completion": []}, r"prompt\[0\] must be a message"),
        ({"messages": [user("a"), {**user("b"), "content": None}]}, r"messages\[1\] must be"),
    ],
)
def test_wrong_types_are_named(plain: Tokenizer, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match="^f:7: .*" + message):
        parse_completion(Row(fields, "f:7"), plain)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "ranked": "b"}, "ranked must be a list of two or more"),
        ({"prompt": "a", "ranked": ["b"]}, "ranked must be a list of two or more"),
        ({"prompt": "a", "ranked": ["b", 3]}, r"ranked\[1\] must be a string or a list"),
        ({"chosen": "a", "rejected": [assistant("b")]}, "all strings or all lists"),
    ],
)
def test_wrong_rankings_are_named(plain: Tokenizer, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match="^f:7: .*" + message):
        parse_ranking(Row(fields, "f:7"), plain)


def test_template_faults(plain: Tokenizer) -> None:
    chat = row(prompt=[user("q")], completion=[assistant("r")])
    mismatched = plain.with_chat_template(MISMATCHED_TEMPLATE)
    with pytest.raises(DataError, match=r"f:7: .* does not render .*--chat-template"):
        parse_completion(chat, mismatched)
    refuses = plain.with_chat_template("{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"f:7: the chat template refuses .*no system role"):
        parse_completion(chat, refuses)
    with pytest.raises(ValueError, match="no chat template") as caught:
        parse_completion(chat, plain.with_chat_template(""))
    assert not isinstance(caught.value, DataError)  # not the row's fault: never skipped

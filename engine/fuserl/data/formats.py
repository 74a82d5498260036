"""Rows in TRL's formats to text examples: what is the prompt, what is the completion.

    language modelling    {"text"} or {"messages"}
    prompt-completion     {"prompt", "completion"}
    preference            {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} whose
                          common beginning is the prompt
    ranking               {"prompt", "ranked": [best, ..., worst]}
    prompt only           {"prompt", ...}: the other keys become columns for reward functions

A field is a string (standard) or a list of {"role", "content"} messages (conversational).
Conversations are rendered by the tokenizer's chat template; a completion is what the rendering
of prompt + completion adds to that of the prompt with its generation prompt. Each parser takes
one row and raises DataError if it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fuserl.data.rows import DataError, Row
from fuserl.tokenizer import ChatTemplateError, Tokenizer

Message = dict[str, Any]
Field = str | list[Message]


@dataclass(frozen=True, slots=True)
class CompletionText:
    """A prompt and the completion to learn."""

    prompt: str | None  # None: language modelling, the completion is the whole text
    completion: str
    chat: bool  # rendered by a chat template, which has written the special tokens
    where: str


@dataclass(frozen=True, slots=True)
class RankingText:
    """A prompt and two or more completions, best first."""

    prompt: str
    completions: tuple[str, ...]
    chat: bool
    where: str


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt to sample completions for."""

    prompt: str
    columns: dict[str, Any]  # the row's other keys
    chat: bool
    where: str


def parse_completion(row: Row, tokenizer: Tokenizer) -> CompletionText:
    """A language-modelling or prompt-completion row."""
    keys = _match_keys(row, ("prompt", "completion"), ("messages",), ("text",))
    if keys == ("text",):
        return CompletionText(None, _string(row, "text"), False, row.where)
    if keys == ("messages",):
        messages = _messages(row, "messages", row.fields["messages"])
        text = _render(row, tokenizer, messages, add_generation_prompt=False)
        return CompletionText(None, _end_at_eos(text, tokenizer), True, row.where)
    prompt, completion = (_field(row, key) for key in keys)
    prompt_text, (text,), chat = _as_text(row, tokenizer, prompt, [completion])
    return CompletionText(prompt_text, text, chat, row.where)


def parse_ranking(row: Row, tokenizer: Tokenizer) -> RankingText:
    """A ranking or preference row; a preference is a ranking of two."""
    keys = _match_keys(
        row, ("prompt", "ranked"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")
    )
    if "ranked" in keys:
        prompt, completions = _field(row, "prompt"), _ranked(row)
    elif "prompt" in keys:
        prompt, *completions = (_field(row, key) for key in keys)
    else:
        prompt, *completions = _split_common_prompt(row)
    prompt_text, texts, chat = _as_text(row, tokenizer, prompt, completions)
    return RankingText(prompt_text, texts, chat, row.where)


def parse_prompt(row: Row, tokenizer: Tokenizer) -> PromptText:
    """Any row with a prompt."""
    _match_keys(row, ("prompt",))
    text, _, chat = _as_text(row, tokenizer, _field(row, "prompt"), [])
    columns = {key: value for key, value in row.fields.items() if key != "prompt"}
    return PromptText(text, columns, chat, row.where)


def _match_keys(row: Row, *key_sets: tuple[str, ...]) -> tuple[str, ...]:
    """The first key set the row has in full."""
    for keys in key_sets:
        if all(key in row.fields for key in keys):
            return keys
    expected = " | ".join("{" + ", ".join(keys) + "}" for keys in key_sets)
    found = "{" + ", ".join(map(str, row.fields)) + "}"
    raise DataError(f"{row.where}: expected one of the key sets {expected}; found {found}")


def _string(row: Row, key: str) -> str:
    value = row.fields[key]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {key} must be a string, not {type(value).__name__}")
    return value


def _field(row: Row, key: str) -> Field:
    value = row.fields[key]
    return value if isinstance(value, str) else _messages(row, key, value)


def _ranked(row: Row) -> list[Field]:
    values = row.fields["ranked"]
    if not isinstance(values, list) or len(values) < 2:
        raise DataError(f"{row.where}: ranked must be a list of two or more completions")
    return [
        value if isinstance(value, str) else _messages(row, f"ranked[{index}]", value)
        for index, value in enumerate(values)
    ]


def _messages(row: Row, name: str, value: object) -> list[Message]:
    """The field's messages, checked; other keys of a message are left to the template."""
    if not isinstance(value, list):
        raise DataError(
            f"{row.where}: {name} must be a string or a list of messages, "
            f"not {type(value).__name__}"
        )
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"{row.where}: {name}[{index}] must be a message "
                '{"role": string, "content": string}'
            )
    return value


def _split_common_prompt(row: Row) -> tuple[Field, Field, Field]:
    """(prompt, chosen, rejected) of a row whose prompt is the common beginning of the two:
    whole messages, or text up to the last common whitespace, which opens the completions."""
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        boundary = re.search(r"\s\S*\Z", chosen[: _common_length(chosen, rejected)])
        end = boundary.start() if boundary else 0
        return chosen[:end], chosen[end:], rejected[end:]
    if isinstance(chosen, list) and isinstance(rejected, list):
        end = _common_length(chosen[:-1], rejected[:-1])  # a message is left to each
        return chosen[:end], chosen[end:], rejected[end:]
    raise _mixed(row)


def _common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items the two begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _as_text(
    row: Row, tokenizer: Tokenizer, prompt: Field, completions: Sequence[Field]
) -> tuple[str, tuple[str, ...], bool]:
    """(prompt, completions, whether they are conversational), rendered where they are."""
    if isinstance(prompt, str):
        texts = tuple(completion for completion in completions if isinstance(completion, str))
        if len(texts) != len(completions):
            raise _mixed(row)
        return prompt, texts, False
    if not prompt:
        raise DataError(f"{row.where}: the prompt has no messages")
    prompt_text = _render(row, tokenizer, prompt, add_generation_prompt=True)
    rendered = []
    for completion in completions:
        if isinstance(completion, str):
            raise _mixed(row)
        rendered.append(_render_completion(row, tokenizer, prompt, prompt_text, completion))
    return prompt_text, tuple(rendered), True


def _render_completion(
    row: Row,
    tokenizer: Tokenizer,
    prompt: list[Message],
    prompt_text: str,
    completion: list[Message],
) -> str:
    if not any(message["content"] for message in completion):
        return ""
    whole = _render(row, tokenizer, prompt + completion, add_generation_prompt=False)
    if not whole.startswith(prompt_text):
        raise DataError(
            f"{row.where}: the chat template does not render prompt + completion as the prompt "
            "followed by more text; use a template (--chat-template) whose generation prompt is "
            "how an assistant message begins, or plain-text rows"
        )
    return _end_at_eos(whole[len(prompt_text) :], tokenizer)


def _render(
    row: Row, tokenizer: Tokenizer, messages: list[Message], *, add_generation_prompt: bool
) -> str:
    if not messages:
        return ""
    try:
        return tokenizer.render_chat(messages, add_generation_prompt)
    except ChatTemplateError as error:
        raise DataError(f"{row.where}: {error}") from error


def _end_at_eos(text: str, tokenizer: Tokenizer) -> str:
    """Sampling stops at the EOS, so the line break a template writes after it is not trained."""
    ended = text.rstrip()
    return ended if ended.endswith(tokenizer.eos_token) else text


def _mixed(row: Row) -> DataError:
    return DataError(
        f"{row.where}: the prompt and its completions must be all strings or all lists of messages"
    )


def training_texts(rows: Sequence[Row], template: str) -> Iterator[str]:
    """Every text of the rows, for training a tokenizer: fields of any of the formats above,
    messages' contents, and the text around each prompt."""
    yield from template.split("{prompt}")
    for row in rows:
        for key in ("text", "messages", "prompt", "completion", "chosen", "rejected", "ranked"):
            yield from _texts(row.fields.get(key))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.get("content"))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)

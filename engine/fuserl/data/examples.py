"""Tokenised examples: what the stages train on, and what became of every row.

Prompts and completions are encoded separately and joined as ids, so the ids trained are those
sampling would see: prompt ids in, completion ids out, the last of them the EOS. Nothing is
decoded and encoded again, and nothing is dropped without being counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeVar

from fuserl.data.counts import Counts
from fuserl.data.formats import (
    CompletionText,
    PromptText,
    RankingText,
    parse_completion,
    parse_prompt,
    parse_ranking,
)
from fuserl.data.prompt_template import PLACEHOLDER, EncodedPrompt, PromptTemplate
from fuserl.data.rows import DataError, Row, Source, parse_each, read_rows, source_name
from fuserl.tokenizer import Tokenizer

OverLong = Literal["filter", "truncate"]
Text = TypeVar("Text", CompletionText, RankingText, PromptText)


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and the completion to learn; only the completion is trained."""

    prompt_ids: tuple[int, ...]  # [P], P >= 1
    completion_ids: tuple[int, ...]  # [T], the last is the EOS
    where: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt and two or more different completions, best first."""

    prompt_ids: tuple[int, ...]  # [P], P >= 1
    completions: tuple[tuple[int, ...], ...]  # [K][T_k], the last of each is the EOS
    where: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to sample completions for."""

    ids: tuple[int, ...]  # [P], P >= 1
    text: str  # the row's own, whole; of a conversation, what the chat template rendered
    columns: dict[str, Any]  # the row's other keys, for reward functions
    where: str


def load_completions(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    prompt_template: str = PLACEHOLDER,
    over_long: OverLong = "filter",
    skip_bad_rows: bool = False,
) -> tuple[list[PromptCompletion], Counts]:
    """Language-modelling and prompt-completion rows, at most `max_length` tokens in all.

    A text without a prompt has the BOS as its prompt, or its first token if there is no BOS.
    over_long="truncate" cuts the end of a plain prompt's document; a row with nothing to cut
    (a text, a conversation, a completion as long as the limit) is dropped all the same.
    DataError if no row is left.
    """
    eos = tokenizer.eos_token_id
    loader = _Loader(tokenizer, max_length, prompt_template, over_long)
    texts = loader.parse(source, parse_completion, skip_bad_rows)
    prompts = loader.encode_prompts([(text.prompt or "", text.chat) for text in texts])
    encoded = tokenizer.encode_texts([text.completion for text in texts])
    examples = []
    for text, prompt, ids in zip(texts, prompts, encoded, strict=True):
        completion = _end_with(eos, ids)
        if text.prompt is None and completion:
            prompt, completion = _split_text(completion, None if text.chat else loader.bos)
        if prompt is None or not completion:
            loader.tally["empty"] += 1
        elif (prompt_ids := loader.fit(prompt, len(completion))) is not None:
            examples.append(PromptCompletion(prompt_ids, completion, text.where))
    return examples, loader.counts(len(examples))


def load_rankings(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    prompt_template: str = PLACEHOLDER,
    over_long: OverLong = "filter",
    skip_bad_rows: bool = False,
) -> tuple[list[Ranking], Counts]:
    """Preference and ranking rows; prompt and longest completion have at most `max_length` tokens.

    Empty and repeated completions are taken out, and the row is dropped if fewer than two are
    left; else as `load_completions`.
    """
    eos = tokenizer.eos_token_id
    loader = _Loader(tokenizer, max_length, prompt_template, over_long)
    texts = loader.parse(source, parse_ranking, skip_bad_rows)
    prompts = loader.encode_prompts([(text.prompt, text.chat) for text in texts])
    encoded = iter(tokenizer.encode_texts(list(chain(*(text.completions for text in texts)))))
    examples = []
    for text, prompt in zip(texts, prompts, strict=True):
        completions = [_end_with(eos, next(encoded)) for _ in text.completions]
        filled = [completion for completion in completions if completion]
        distinct = tuple(dict.fromkeys(filled))
        if prompt is None:
            loader.tally["empty"] += 1
        elif len(distinct) < 2:
            loader.tally["equal_pairs" if len(distinct) < len(filled) else "empty"] += 1
        elif (prompt_ids := loader.fit(prompt, max(map(len, distinct)))) is not None:
            loader.tally["dropped_completions"] += len(completions) - len(distinct)
            examples.append(Ranking(prompt_ids, distinct, text.where))
    return examples, loader.counts(len(examples))


def load_prompts(
    source: Source,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    prompt_template: str = PLACEHOLDER,
    over_long: OverLong = "filter",
    skip_bad_rows: bool = False,
) -> tuple[list[Prompt], Counts]:
    """The prompts of any rows that have one, at most `max_prompt_length` tokens each; else as
    `load_completions`, but the tokenizer needs no EOS."""
    loader = _Loader(tokenizer, max_prompt_length, prompt_template, over_long)
    texts = loader.parse(source, parse_prompt, skip_bad_rows)
    prompts = loader.encode_prompts([(text.prompt, text.chat) for text in texts])
    examples = []
    for text, prompt in zip(texts, prompts, strict=True):
        if prompt is None:
            loader.tally["empty"] += 1
        elif (ids := loader.fit(prompt, 0)) is not None:
            examples.append(Prompt(ids, text.prompt, text.columns, text.where))
    return examples, loader.counts(len(examples))


class _Loader:
    """The options of one load, the rules for prompts, and the tally of what they did."""

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, prompt_template: str, over_long: OverLong
    ) -> None:
        if max_length < 1:
            raise ValueError(f"the maximum length must be at least 1, not {max_length}")
        if over_long not in ("filter", "truncate"):
            raise ValueError(f'over_long must be "filter" or "truncate", not {over_long!r}')
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.over_long = over_long
        self.template = PromptTemplate.parse(prompt_template)
        self.bos = tokenizer.bos_token_id
        self.tally: Counter[str] = Counter()
        # What an empty prompt becomes; there is no good answer without a BOS, nor for a
        # template around nothing.
        self.empty_prompt: EncodedPrompt | None = None
        if self.bos is not None and self.template.is_bare:
            self.empty_prompt = EncodedPrompt([self.bos], [], lead=1)

    def parse(
        self, source: Source, parse: Callable[[Row, Tokenizer], Text], skip_bad_rows: bool
    ) -> list[Text]:
        """The rows' text examples; counts rows and bad rows."""
        self.source_name = source_name(source)
        rows, num_unreadable = read_rows(source, skip_bad_rows=skip_bad_rows)
        texts, num_wrong = parse_each(
            rows, lambda row: parse(row, self.tokenizer), skip_bad_rows=skip_bad_rows
        )
        self.tally["rows"] = len(rows) + num_unreadable
        self.tally["bad_rows"] = num_unreadable + num_wrong
        return texts

    def encode_prompts(self, prompts: Sequence[tuple[str, bool]]) -> list[EncodedPrompt | None]:
        """(text, whether a chat template rendered it) -> ids, or None where there are none."""
        plain = iter(self.template.encode([t for t, chat in prompts if not chat], self.tokenizer))
        chats = iter(self.tokenizer.encode_texts([t for t, chat in prompts if chat]))
        encoded: list[EncodedPrompt | None] = []
        for text, chat in prompts:
            if chat:
                ids = next(chats)
                encoded.append(EncodedPrompt(ids, [], lead=len(ids)) if ids else None)
                continue
            prompt = next(plain)
            is_empty = not text or (self.template.is_bare and len(prompt) == prompt.lead)
            encoded.append(self.empty_prompt if is_empty else prompt)
        return encoded

    def fit(self, prompt: EncodedPrompt, num_others: int) -> tuple[int, ...] | None:
        """The prompt's ids if they and `num_others` more keep to the maximum length, cut if that
        is wanted; None, counted as over-long, if the row is to be dropped."""
        room = self.max_length - num_others
        is_over_long = len(prompt) > room
        ids = None if is_over_long and self.over_long == "filter" else prompt.fit(room)
        if ids is None:
            self.tally["over_long"] += 1
        else:
            self.tally["truncated"] += is_over_long
            self.tally["bos_prompts"] += prompt is self.empty_prompt
        return ids

    def counts(self, num_kept: int) -> Counts:
        """The tally; DataError if nothing was kept."""
        counts = Counts(kept=num_kept, **self.tally)
        if num_kept:
            return counts
        if counts.over_long:
            remedy = f"raise the maximum length ({self.max_length})"
            if self.over_long == "filter":
                remedy += ' or truncate prompts (over_long="truncate")'
        elif counts.bad_rows:
            remedy = "load without skipping bad rows to see the first of them"
        else:
            remedy = "check that prompts and completions are filled in and differ"
        raise DataError(f"{self.source_name}: no row is left: {counts.summary()}; {remedy}")


def _end_with(eos: int, ids: list[int]) -> tuple[int, ...]:
    """A completion's ids with one EOS at the end; () if there is nothing before it."""
    if not ids or ids == [eos]:
        return ()
    return tuple(ids) if ids[-1] == eos else (*ids, eos)


def _split_text(ids: tuple[int, ...], bos: int | None) -> tuple[EncodedPrompt, tuple[int, ...]]:
    """A whole text as (prompt, completion): its BOS, put there if need be, else its first token,
    is the prompt. bos None: none is added."""
    if bos is not None and ids[0] != bos:
        ids = (bos, *ids)
    return EncodedPrompt([ids[0]], [], lead=1), ids[1:]

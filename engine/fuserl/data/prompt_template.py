"""A template around plain-text prompts, and prompts whose document can be cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuserl.tokenizer import Tokenizer

PLACEHOLDER = "{prompt}"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Ids of a prompt: head (what comes first, then the document) and tail (what comes after)."""

    head: list[int]
    tail: list[int]
    lead: int  # the first ids of head that are not the document; all of it where none may be cut

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)

    def fit(self, room: int) -> tuple[int, ...] | None:
        """The ids, at most `room` of them: the document's end is cut, what is around it stays.
        None if nothing of the document would be left."""
        kept = room - len(self.tail)
        if kept >= len(self.head):
            return (*self.head, *self.tail)
        if kept <= self.lead:
            return None
        return (*self.head[:kept], *self.tail)


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The text before and after each document."""

    before: str
    after: str

    @classmethod
    def parse(cls, template: str) -> PromptTemplate:
        """ "{prompt}\\nTL;DR:" -> before "", after "\\nTL;DR:"."""
        parts = template.split(PLACEHOLDER)
        if len(parts) != 2:
            raise ValueError(
                f"prompt_template must contain {PLACEHOLDER} exactly once, not {template!r}"
            )
        return cls(*parts)

    @property
    def is_bare(self) -> bool:
        """Whether the prompt is the document alone."""
        return not (self.before or self.after)

    def encode(self, documents: Sequence[str], tokenizer: Tokenizer) -> list[EncodedPrompt]:
        """The part up to the document's end and the part after it are encoded separately, so
        that a cut prompt has the same tail ids as a whole one."""
        lead = len(tokenizer.encode_prompt(self.before))
        tail = tokenizer.encode_text(self.after)
        heads = tokenizer.encode_prompts([self.before + document for document in documents])
        return [EncodedPrompt(head, tail, lead) for head in heads]

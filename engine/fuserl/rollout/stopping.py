"""What ends a completion beside its limit: token ids, and strings that its text comes to hold."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRule:
    """The default ends nothing.

    Strings are looked for by the host, but only in completions whose last token can have completed
    one: which tokens those are is a table, read where tokens are drawn.
    """

    token_ids: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None  # for strings

    @classmethod
    def of(
        cls,
        eos_token_id: int | None,
        *,
        stop_token_ids: Collection[int] = (),
        stop: str | Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        vocab_size: int,
    ) -> "StopRule":
        """ValueError for ids outside the vocabulary, an empty string, a string that no text can
        hold, and strings without a tokenizer."""
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        eos = () if eos_token_id is None else (eos_token_id,)
        for name, numbers in (("eos_token_id", eos), ("stop_token_ids", tuple(stop_token_ids))):
            wrong = [i for i in numbers if not isinstance(i, int) or not 0 <= i < vocab_size]
            if wrong:
                raise ValueError(f"{name} {wrong[0]} is outside the vocabulary of {vocab_size}")
        ids = frozenset((*eos, *stop_token_ids))
        if not all(strings):
            raise ValueError("stop must not hold an empty string")
        for string in strings:
            if tokenizer is None:
                raise ValueError("stop strings need a tokenizer: give stop_token_ids instead")
            for token, i in tokenizer.special_tokens_in(string).items():
                raise ValueError(
                    f"stop {string!r} holds the special token {token!r}, which is in no text: "
                    f"give its id {i} in stop_token_ids"
                )
        return cls(token_ids=ids, strings=strings, tokenizer=tokenizer)

    def stop_table(self, vocab_size: int, device: torch.device) -> Tensor | None:
        """[V] bool, True for the ids that end a completion; None where there are none."""
        return _table(self.token_ids, vocab_size, device)

    def flag_table(self, vocab_size: int, device: torch.device) -> Tensor | None:
        """[V] bool, True for the flagged ids; None where there are none."""
        return _table(self.flagged_ids, vocab_size, device)

    @property
    def flagged_ids(self) -> frozenset[int]:
        """The tokens after which the text may hold a stop string that it did not hold before."""
        if self.tokenizer is None or not self.strings:
            return frozenset()
        last = {string[-1] for string in self.strings}
        if " " in last:  # a tokenizer may leave out the space that a token alone begins with
            return frozenset(range(self.tokenizer.vocab_size))
        # A token that is part of a character may complete one.
        return frozenset(
            i
            for i, text in enumerate(self.tokenizer.token_texts)
            if _BROKEN in text or last & set(text)
        )

    def met_at(self, token_ids: Sequence[int]) -> int | None:
        """The number of tokens after which the text of a completion first holds one of the
        strings; None if it holds none."""
        if self.tokenizer is None or not self._is_in(token_ids):
            return None
        return next(n for n in range(1, len(token_ids) + 1) if self._is_in(token_ids[:n]))

    def cut(self, text: str) -> str:
        """What of a completion's text stands before the first stop string."""
        found = [at for string in self.strings if (at := text.find(string)) >= 0]
        return text[: min(found)] if found else text

    def _is_in(self, token_ids: Sequence[int]) -> bool:
        if self.tokenizer is None or not self.strings:
            return False
        text = self.tokenizer.decode(token_ids)
        return any(string in text for string in self.strings)


def _table(ids: Collection[int], vocab_size: int, device: torch.device) -> Tensor | None:
    if not ids:
        return None
    table = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
    table[torch.tensor(sorted(ids), device="cpu")] = True
    return table.to(device)

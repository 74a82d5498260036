"""What became of the rows of a data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Row counts of one load; rows == kept + bad_rows + over_long + empty + equal_pairs."""

    rows: int = 0
    kept: int = 0
    # Dropped:
    bad_rows: int = 0  # unreadable, or without the expected keys
    over_long: int = 0
    empty: int = 0  # nothing to learn from: an empty completion, or an empty prompt and no BOS
    equal_pairs: int = 0  # fewer than two different completions to compare
    # Kept, and changed:
    truncated: int = 0  # the end of the prompt's document was cut
    bos_prompts: int = 0  # an empty prompt became a BOS
    # Completions, not rows: empty or repeated ones taken out of a ranking that was kept.
    dropped_completions: int = 0

    def summary(self) -> str:
        """One line, as "11,970 rows: 11,801 kept, 169 over-long dropped"."""
        parts = [f"{self.kept:,} kept"]
        for count, words in (
            (self.bad_rows, "bad skipped"),
            (self.over_long, "over-long dropped"),
            (self.empty, "empty dropped"),
            (self.equal_pairs, "with equal completions dropped"),
            (self.truncated, "truncated"),
            (self.bos_prompts, "with a BOS for an empty prompt"),
            (self.dropped_completions, "repeated or empty completions dropped from rankings"),
        ):
            if count:
                parts.append(f"{count:,} {words}")
        return f"{self.rows:,} {'row' if self.rows == 1 else 'rows'}: {', '.join(parts)}"

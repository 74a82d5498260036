"""Rows in, token batches out. `batching` is imported by its own name: it alone needs torch."""

from fuserl.data.counts import Counts
from fuserl.data.examples import (
    OverLong,
    Prompt,
    PromptCompletion,
    Ranking,
    load_completions,
    load_prompts,
    load_rankings,
)
from fuserl.data.rows import DataError, Row, read_rows

__all__ = [
    "Counts",
    "DataError",
    "OverLong",
    "Prompt",
    "PromptCompletion",
    "Ranking",
    "Row",
    "load_completions",
    "load_prompts",
    "load_rankings",
    "read_rows",
]

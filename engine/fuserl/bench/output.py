"""How a benchmark ends: with a file, or because an answer is wrong."""

import json
import os
from pathlib import Path
from typing import Any


class WrongAnswer(ValueError):
    """An answer is wrong, so that nothing was timed."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, so that a run cut off leaves the last good file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)

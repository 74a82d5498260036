"""fuserl.json: what it keeps, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from fuserl.model.notes import FolderNotes, read_notes, write_notes


def test_notes_round_trip(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == FolderNotes()
    notes = FolderNotes(prompt_template="Synopsis: {prompt}\n\nTitle — ")
    write_notes(notes, tmp_path / "new")
    assert read_notes(tmp_path / "new") == notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt_templat": "{prompt}"}, "unknown key 'prompt_templat' .*known: prompt_template"),
        ({"prompt_template": 3}, "prompt_template must be a text"),
        ({"prompt_template": "no place"}, "prompt_template must be a text with {prompt}"),
        ({"prompt_template": "{prompt}, {prompt}"}, "prompt_template .* exactly once"),
    ],
)
def test_notes_that_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "fuserl.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"fuserl\.json: " + message):
        read_notes(tmp_path)

"""What to know about a model that no Hugging Face file has a place for: fuserl.json."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fuserl.model.files import read_json, write_json

NOTES_FILE = "fuserl.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderNotes:
    """The content of a folder's fuserl.json."""

    prompt_template: str = "{prompt}"
    """The text given to the model, with {prompt} once, where the prompt goes."""

    def __post_init__(self) -> None:
        template = self.prompt_template
        if not isinstance(template, str) or template.count("{prompt}") != 1:
            raise ValueError(
                f"prompt_template must be a text with {{prompt}} in it exactly once, "
                f"not {template!r}"
            )


def read_notes(folder: str | Path) -> FolderNotes:
    """The defaults where the folder has no notes."""
    path = Path(folder) / NOTES_FILE
    if not path.exists():
        return FolderNotes()
    raw = read_json(path)
    known = [field.name for field in dataclasses.fields(FolderNotes)]
    if unknown := sorted(raw.keys() - set(known)):
        raise ValueError(f"{path}: unknown key {unknown[0]!r} (known: {', '.join(known)})")
    try:
        return FolderNotes(**raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_notes(notes: FolderNotes, folder: str | Path) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTES_FILE, dataclasses.asdict(notes))

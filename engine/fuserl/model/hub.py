"""Finding a model folder: on this machine, or on the Hugging Face hub."""

import re
from pathlib import Path

from fuserl.model.config import SMALL_NAMES
from fuserl.model.config_json import CONFIG_FILE
from fuserl.model.stored import HEAD_FILE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = [
    "*.json",
    "model*.safetensors",
    HEAD_FILE,
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
]


def resolve_folder(name: str | Path) -> Path:
    """The local folder that `name` stands for.

    An existing folder is taken as it is. A string that reads like a hub id ("org/name") is
    downloaded from the Hugging Face hub, without pickle weights and code. A Path is never
    looked up on the hub.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; a model is a folder with {CONFIG_FILE}")
    looked_for = f"no model {str(name)!r}: there is no such folder"
    hint = f"only sft trains from scratch, by the names {', '.join(SMALL_NAMES)}"
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{looked_for}, and it is no hub id (org/name); {hint}")

    from huggingface_hub import snapshot_download

    try:
        # fnmatch's * crosses slashes: without ignore_patterns, copies for other runtimes in
        # subfolders would come along.
        path = snapshot_download(name, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{looked_for}, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {error}); {hint}"
        ) from error
    return Path(path)

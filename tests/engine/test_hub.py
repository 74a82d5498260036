"""Finding a folder: what is taken as it is, what is looked up, and what comes down."""

from pathlib import Path

import pytest
from folders import TIED, language_model

from fuserl.model.config import SMALL_NAMES
from fuserl.model.folder import save_model
from fuserl.model.hub import resolve_folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(language_model(TIED), tmp_path / "model")
    return tmp_path / "model"


def test_an_existing_folder_is_taken_as_it_is(saved: Path) -> None:
    assert resolve_folder(saved) == saved
    assert resolve_folder(str(saved)) == saved


def test_a_file_is_no_model(saved: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        resolve_folder(saved / "config.json")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "a/b/c", "/a/b", "~/a", Path("a/b")])
def test_what_cannot_be_on_the_hub_is_not_looked_up(
    name: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError, match=r"no such folder.*no hub id.*tiny, small, medium"):
        resolve_folder(name)


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_names_of_small_configurations_are_for_sft(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="only sft trains from scratch"):
        resolve_folder(name)


def test_a_hub_id_is_downloaded_without_pickles_and_code(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    published = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "fuserl.json",
        "fuserl_head.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    refused = [
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
        "README.md",
    ]

    def download(name: str, **patterns: list[str]) -> str:
        assert name == "org/name-1.5"
        assert list(filter_repo_objects(published + refused, **patterns)) == published
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("org/name-1.5") == saved


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'org/absent'.*no such folder.*hub.*tiny, small"):
        resolve_folder("org/absent")

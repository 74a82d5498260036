"""The state of an unfinished run: weights, optimizer, progress. Safetensors and JSON, no pickle.

Everything random in the engine is a function of (seed, step), so there is no generator to save.
A checkpoint is written beside the last one and takes its place by renaming: a kill at any moment
leaves one whole checkpoint.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fuserl.optimizer import Optimizer
from fuserl.tokenizer import Tokenizer


class Checkpoint:
    """The folder `checkpoint` inside a run's folder."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "checkpoint"
        self._new = out / "checkpoint.new"
        self._old = out / "checkpoint.old"

    def exists(self) -> bool:
        return self._folder.exists() or self._old.exists()

    def save(
        self, modules: Mapping[str, nn.Module], optimizer: Optimizer, progress: Mapping[str, Any]
    ) -> None:
        """Frozen weights are not saved: a resumed run has them from where it started.
        progress: what JSON holds; read back by `progress`."""
        shutil.rmtree(self._new, ignore_errors=True)
        self._new.mkdir(parents=True)
        for name, module in modules.items():
            _save(_moving_state(module), self._new / f"{name}.safetensors")
        _save(optimizer.state(), self._new / "optimizer.safetensors")
        with (self._new / "progress.json").open("w") as file:
            json.dump({**progress, "optimizer_steps": optimizer.steps}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if self._folder.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self._folder.rename(self._old)
        self._new.rename(self._folder)
        shutil.rmtree(self._old, ignore_errors=True)

    def progress(self) -> dict[str, Any]:
        return json.loads((self._whole() / "progress.json").read_text())

    def load(self, modules: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
        """Fill modules and optimizer in place. What is frozen stays as it is: the run's start."""
        folder = self._whole()
        for name, module in modules.items():
            frozen = module.state_dict().keys() - _moving_state(module).keys()
            stored = load_file(folder / f"{name}.safetensors")
            found = module.load_state_dict(stored, strict=False)
            if found.unexpected_keys or set(found.missing_keys) != frozen:
                raise ValueError(f"{folder / name}.safetensors is of another model")
        optimizer.load_state(
            load_file(folder / "optimizer.safetensors"), self.progress()["optimizer_steps"]
        )

    def remove(self) -> None:
        """Under a name that does not count, so that a kill leaves no half of a checkpoint."""
        for folder in (self._old, self._folder):
            shutil.rmtree(self._new, ignore_errors=True)
            if folder.exists():
                folder.rename(self._new)
        shutil.rmtree(self._new, ignore_errors=True)

    def _whole(self) -> Path:
        return self._folder if self._folder.exists() else self._old


def _moving_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state that a run may change: without the parameters that are frozen."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: t for name, t in module.state_dict().items() if name not in frozen}


def digest(module: nn.Module) -> str:
    """SHA-256 of the names and bits of a module's weights."""
    hashed = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        hashed.update(name.encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


def digest_ids(rows: Iterable[Sequence[Sequence[int]]]) -> str:
    """SHA-256 of rows of token ids, such as (prompt, completion); where each ends counts too."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(array("q", [len(row), *map(len, row), *chain.from_iterable(row)]))
    return hashed.hexdigest()


def digest_tokenizer(tokenizer: Tokenizer) -> str:
    """SHA-256 of the vocabulary and rules that saving it writes."""
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def _save(tensors: Mapping[str, Any], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())

"""Safetensors files of a folder: what their headers say, and writing them, in shards if need be.

Headers give every name, shape and dtype, so that a folder is checked before anything is
allocated. Pickle weights are never opened.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fuserl.model.files import read_json, replace_file, write_json

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD_FILE = "fuserl_head.safetensors"
"""Ours: what transformers has no place for in a reward model (the bias of the scalar head, or all
of an MLP head), and the language-model head its starting model had, where that is not the
embeddings."""

CRITIC_FILE = "fuserl_critic.safetensors"
"""Ours: the head of a critic on the decoder of the policy beside it."""

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_PICKLE_PATTERNS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
_SHARD = "{stem}-{number:05d}-of-{count:05d}.safetensors"
_SHARD_STEMS = ("model", "model-next")  # the second while shards of the first are in use
_SHARD_NAME = re.compile(r"model(-next)?-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a safetensors header says of one tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name for it


# Reading


def weights_source(folder: Path) -> Path:
    """The file that says what weights a folder has."""
    single = folder / WEIGHTS_FILE
    return single if single.exists() else folder / INDEX_FILE


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, by name: of its one file, else of the shards in its index."""
    if (folder / WEIGHTS_FILE).exists():
        return read_header(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.exists():
        raise _no_weights(folder)
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        first = next(key for key, name in weight_map.items() if name == missing[0])
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files named in {INDEX_FILE}: "
            f"{', '.join(missing)} (with {first}); download or copy the folder again"
        )
    stored: dict[str, StoredTensor] = {}
    for name in names:
        for key, tensor in read_header(folder / name).items():
            if key in stored:
                raise ValueError(f"{key} is both in {stored[key].file} and in {tensor.file}")
            stored[key] = tensor
    for key, name in weight_map.items():
        if key not in stored or stored[key].file != folder / name:
            raise ValueError(f"{folder / name}: {key} is missing, though {index} places it there")
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map must give a file name for each tensor")
    if outside := [name for name in weight_map.values() if Path(name).name != name]:
        raise ValueError(f"{index}: {outside[0]!r} in weight_map is no file of the folder")
    return weight_map


def _no_weights(folder: Path) -> Exception:
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        return ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is loaded, and is "
            f"refused; convert the weights to {WEIGHTS_FILE}, for example by from_pretrained and "
            f"save_pretrained of transformers on a machine that may run that code"
        )
    return FileNotFoundError(
        f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE} "
        f"(pickle weights are neither downloaded nor loaded)"
    )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes; the file's length is checked against them."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: StoredTensor(path, key, tuple(view.get_shape()), view.get_dtype())
                for key, view in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}); download or copy it again"
        ) from error


def read_tensors(
    stored: Mapping[str, StoredTensor], receive: Callable[[str, Tensor], object]
) -> None:
    """Give each tensor to `receive` by its key, file by file, one in memory at a time. It may be
    backed by the file: copy what is kept."""
    for path in sorted({tensor.file for tensor in stored.values()}):
        with safe_open(path, framework="pt") as file:
            for key, tensor in stored.items():
                if tensor.file == path:
                    receive(key, file.get_tensor(tensor.name))


# Writing


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # format: some versions of transformers refuse a file that does not name its framework.
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def write_weights(
    folder: Path, names: Mapping[str, int], read: Callable[[str], Tensor], max_shard_bytes: int
) -> None:
    """Write a folder's weights: one file, or shards of at most max_shard_bytes and an index.

    names: the bytes of each tensor. read: the tensor of a name, on the CPU; one shard of them is
    in memory at a time. A kill leaves the old weights or the new ones: new shards never take the
    name of one in use, and the index, or the single file, is what switches over.
    """
    shards = plan_shards(names, max_shard_bytes)
    index = folder / INDEX_FILE
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS_FILE, {name: read(name) for name in shards[0]})
        index.unlink(missing_ok=True)
        _remove_shards(folder, keep=())
        return
    in_use = set(_weight_map(index).values()) if index.exists() else set()
    for stem in _SHARD_STEMS:
        files = [
            _SHARD.format(stem=stem, number=number, count=len(shards))
            for number in range(1, len(shards) + 1)
        ]
        if not in_use.intersection(files):
            break
    for file, shard in zip(files, shards, strict=True):
        write_tensors(folder / file, {name: read(name) for name in shard})
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    metadata = {"total_size": sum(names.values())}
    write_json(index, {"metadata": metadata, "weight_map": weight_map})
    (folder / WEIGHTS_FILE).unlink(missing_ok=True)
    _remove_shards(folder, keep=files)


def plan_shards(names: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where the next would make a shard too large. A tensor larger than a
    shard has one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in names.items():
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def shards_in(folder: Path) -> list[Path]:
    """The files in a folder that are named as shards are."""
    return [path for path in folder.glob("*.safetensors") if _SHARD_NAME.fullmatch(path.name)]


def _remove_shards(folder: Path, keep: Collection[str]) -> None:
    for path in shards_in(folder):
        if path.name not in keep:
            path.unlink()

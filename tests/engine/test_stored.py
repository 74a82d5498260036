"""The files weights are in: shards and their index, broken files, pickles, interrupted saves."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import TIED, UNTIED, assert_same_bits, language_model, transformers_llama
from safetensors.torch import load_file, save_file

from fuserl.model import stored
from fuserl.model.folder import load_language_model, load_scalar_model, save_model
from fuserl.model.stored import plan_shards
from fuserl.model.weights import hf_state


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound folder of a tied language model."""
    save_model(language_model(TIED), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder in several weight files, as transformers writes it."""
    transformers_llama(TIED).save_pretrained(tmp_path / "sharded", max_shard_size=3000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a fault must be found before the model is allocated")

    monkeypatch.setattr(torch.nn.Module, "to_empty", allocate)


# Shards


def test_a_sharded_folder_loads(sharded: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    ours = hf_state(load_language_model(sharded))
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_scalar_model(sharded)[1]


def test_weights_over_the_limit_are_sharded_with_an_index(tmp_path: Path) -> None:
    model = language_model(UNTIED)
    save_model(model, tmp_path, max_shard_bytes=4000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"]) == set(hf_state(model))
    sizes = [sum(tensor.nbytes for tensor in load_file(tmp_path / name).values()) for name in files]
    assert max(sizes) <= 4000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert sum(sizes) == sum(tensor.nbytes for tensor in hf_state(model).values())
    assert_same_bits(load_language_model(tmp_path), model)


def test_a_tensor_larger_than_a_shard_is_alone_in_one() -> None:
    sizes = {"a": 3, "b": 9, "c": 2, "d": 2, "e": 1}
    assert plan_shards(sizes, 4) == [["a"], ["b"], ["c", "d"], ["e"]]
    assert plan_shards(sizes, 17) == [["a", "b", "c", "d", "e"]]


def test_a_limit_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes must be positive, not 0"):
        save_model(language_model(TIED), tmp_path, max_shard_bytes=0)


@pytest.mark.parametrize("limits", [(3000, 3000), (3000, 2000), (10**9, 3000), (3000, 10**9)])
def test_saving_over_a_model_of_other_files(limits: tuple[int, int], tmp_path: Path) -> None:
    """And once more: names of shards alternate, none is left over."""
    for seed, limit in enumerate((*limits, *limits)):
        save_model(language_model(TIED, seed), tmp_path, max_shard_bytes=limit)
        assert_same_bits(load_language_model(tmp_path), language_model(TIED, seed))
        shards = set(tmp_path.glob("*-of-*.safetensors"))
        assert (len(shards) > 1) == (limit < 10**9)
        assert (tmp_path / "model.safetensors").exists() == (not shards)
        assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
        numbers = {path.name.split("-of-")[1] for path in shards}
        assert numbers in (set(), {f"{len(shards):05d}.safetensors"})


@pytest.mark.parametrize("limit", [10**9, 3000])
def test_shards_that_fail_half_way_leave_the_old_weights(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(language_model(TIED), tmp_path, max_shard_bytes=limit)
    write, written = stored.save_file, []

    def write_two(tensors: Any, path: Path, metadata: Any) -> None:
        if len(written) == 2:
            raise OSError("no space left on device")
        written.append(path.name)
        write(tensors, path, metadata)

    monkeypatch.setattr(stored, "save_file", write_two)
    with pytest.raises(OSError, match="no space left"):
        save_model(language_model(TIED, seed=1), tmp_path, max_shard_bytes=3000)
    assert len(written) == 2
    assert_same_bits(load_language_model(tmp_path), language_model(TIED))


def test_saving_over_a_sharded_folder_takes_its_place(sharded: Path) -> None:
    model = language_model(TIED, seed=5)
    save_model(model, sharded)
    assert not (sharded / "model.safetensors.index.json").exists()
    assert_same_bits(load_language_model(sharded), model)


# Broken files


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("size", [0, 5, 300, -1], ids=["empty", "length", "header", "data"])
def test_truncated_weights(size: int, saved: Path) -> None:
    path = saved / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors"):
        load_language_model(saved)


@pytest.mark.usefixtures("no_allocation")
def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} \(with model\.") as caught:
        load_language_model(sharded)
    assert str(sharded) in str(caught.value)


@pytest.mark.usefixtures("no_allocation")
def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_a_shard_that_lacks_what_the_index_promises(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    weights = load_file(shard)
    key, _ = weights.popitem()
    save_file(weights | {"lm_head.weight": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name}: {key} is missing, though .*index\.json"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_a_tensor_in_two_shards_is_an_error(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match=rf"is both in .*{first.name} and in .*{second.name}"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_a_broken_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match=r"index\.json: weight_map"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_an_index_does_not_lead_out_of_its_folder(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "../model.safetensors"}}')
    with pytest.raises(ValueError, match=r"'\.\./model\.safetensors' in weight_map is no file of"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_pickle_weights_are_refused(name: str, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / name)
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*refused; convert.*safetensors"):
        load_language_model(saved)


def test_pickle_weights_beside_safetensors_are_left_alone(saved: Path) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert_same_bits(load_language_model(saved), language_model(TIED))


@pytest.mark.usefixtures("no_allocation")
def test_no_weights_at_all(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*index\.json"):
        load_language_model(saved)


# Interrupted saves


INTERRUPTED_SAVE = """
import os, signal, sys
from pathlib import Path
from fuserl.model import folder, stored
from fuserl.model.config import small_config
from fuserl.model.heads import LanguageModel

write = stored.save_file
def write_half(tensors, path, metadata):
    write(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

stored.save_file = write_half
assert "transformers" not in sys.modules and "huggingface_hub" not in sys.modules
folder.save_model(LanguageModel(small_config("tiny")), sys.argv[1])
"""


def test_a_save_killed_in_the_middle_leaves_the_old_weights(saved: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_SAVE, str(saved)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert_same_bits(load_language_model(saved), language_model(TIED))
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(os.listdir(saved)) > names  # what the kill left
    save_model(language_model(TIED, seed=1), saved)
    assert set(os.listdir(saved)) == names


def test_a_save_that_fails_leaves_the_old_weights(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_some(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    before = sorted(os.listdir(saved))
    monkeypatch.setattr(stored, "save_file", write_some)
    with pytest.raises(OSError, match="no space left"):
        save_model(language_model(TIED, seed=1), saved)
    assert sorted(os.listdir(saved)) == before
    assert_same_bits(load_language_model(saved), language_model(TIED))


def test_a_first_save_that_fails_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(stored, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(language_model(TIED), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_language_model(tmp_path / "new")


def test_files_are_as_readable_as_any_other(saved: Path) -> None:
    (saved / "other").touch()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert set(modes.values()) == {modes["other"]}

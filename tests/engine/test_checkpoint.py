"""Checkpoints: bits survive, and a kill at any moment leaves one whole checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from fuserl.checkpoint import Checkpoint, digest, digest_ids, digest_tokenizer
from fuserl.config import TrainConfig
from fuserl.optimizer import Optimizer
from fuserl.tokenizer import train_tokenizer

CONFIG = TrainConfig(model="m", data="d", out="o", learning_rate=0.1)


def module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def trained(seed: int, num_steps: int) -> tuple[dict[str, nn.Module], Optimizer]:
    modules = {"policy": module(seed), "critic": module(seed + 1)}
    optimizer = Optimizer(modules, CONFIG, total_steps=10)
    for _ in range(num_steps):
        for m in modules.values():
            m(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return modules, optimizer


def assert_loads(out: Path, like: tuple[dict[str, nn.Module], Optimizer], step: int) -> None:
    """What the folder holds is `like`, bit for bit."""
    modules, optimizer = trained(99, 0)
    checkpoint = Checkpoint(out)
    assert checkpoint.exists()
    assert checkpoint.progress()["step"] == step
    checkpoint.load(modules, optimizer)
    for name, own in modules.items():
        assert digest(own) == digest(like[0][name])
    ours, theirs = optimizer.state(), like[1].state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert optimizer.steps == like[1].steps


@pytest.mark.parametrize("num_steps", [0, 3])
def test_round_trip(num_steps: int, tmp_path: Path) -> None:
    state = trained(0, num_steps)
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.exists()
    checkpoint.save(*state, {"step": 7, "note": "é"})
    assert checkpoint.progress() == {"step": 7, "note": "é", "optimizer_steps": num_steps}
    assert_loads(tmp_path, state, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_nothing_is_a_pickle(tmp_path: Path) -> None:
    Checkpoint(tmp_path).save(*trained(0, 1), {"step": 1})
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}


@pytest.fixture
def two_saves(tmp_path: Path) -> tuple[Path, tuple, tuple]:  # type: ignore[type-arg]
    """A folder with a checkpoint of step 1, and the states of steps 1 and 2."""
    first, second = trained(0, 1), trained(5, 2)
    Checkpoint(tmp_path).save(*first, {"step": 1})
    return tmp_path, first, second


KILLS = ["writing", "before the first rename", "between the renames", "before the sweep"]


@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_leaves_a_whole_checkpoint(
    kill: str,
    two_saves: tuple,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, first, second = two_saves

    class Killed(BaseException):
        pass

    renames: list[Path] = []
    rename = Path.rename

    def dying_rename(self: Path, target: Path) -> Path:
        if kill == "before the first rename" or (kill == "between the renames" and renames):
            raise Killed
        renames.append(self)
        return rename(self, target)

    def dying_sweep(path: Path, ignore_errors: bool = False) -> None:
        if kill == "before the sweep" and len(renames) == 2:
            raise Killed
        real_sweep(path, ignore_errors=ignore_errors)

    real_sweep = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying_rename)
        patch.setattr(shutil, "rmtree", dying_sweep)
        if kill == "writing":
            patch.setattr(
                "fuserl.checkpoint.json.dump", lambda *_, **__: (_ for _ in ()).throw(Killed)
            )
        with pytest.raises(Killed):
            Checkpoint(out).save(*second, {"step": 2})

    if kill == "before the sweep":
        assert_loads(out, second, 2)
    else:
        assert_loads(out, first, 1)
    third = trained(8, 3)
    Checkpoint(out).save(*third, {"step": 3})
    assert_loads(out, third, 3)
    assert [path.name for path in out.iterdir()] == ["checkpoint"]


def test_removing_leaves_nothing(two_saves: tuple) -> None:  # type: ignore[type-arg]
    out, *_ = two_saves
    for name in ("checkpoint.new", "checkpoint.old"):
        shutil.copytree(out / "checkpoint", out / name)
    checkpoint = Checkpoint(out)
    checkpoint.remove()
    assert not checkpoint.exists()
    assert list(out.iterdir()) == []
    checkpoint.remove()


def test_a_removal_killed_half_way_leaves_no_half_checkpoint(
    two_saves: tuple,  # type: ignore[type-arg]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, *_ = two_saves
    real_sweep = shutil.rmtree

    def dying_sweep(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            (path / "progress.json").unlink()
            raise KeyboardInterrupt
        real_sweep(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dying_sweep)
        with pytest.raises(KeyboardInterrupt):
            Checkpoint(out).remove()
    assert not Checkpoint(out).exists()


def test_digests_see_every_bit() -> None:
    first, second = module(0), module(0)
    assert digest(first) == digest(second)
    with torch.no_grad():
        weight = second.state_dict()["1.bias"]
        weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    assert digest(first) != digest(second)
    assert digest(first.bfloat16()) != digest(second.bfloat16().float())


def test_digests_of_ids_see_where_each_ends() -> None:
    different = [
        [((1, 2), (3,))],
        [((1,), (2, 3))],
        [((1, 2, 3),)],
        [((1, 2),), ((3,),)],
        [((1, 2), (4,))],
        [((3,), (1, 2))],
        [],
    ]
    digests = [digest_ids(rows) for rows in different]
    assert len(set(digests)) == len(digests)
    assert digest_ids(iter([([1, 2], [3])])) == digests[0]


def test_digests_of_tokenizers_see_the_vocabulary() -> None:
    """Two tokenizers that give their own texts the same ids."""
    first, again, other = (train_tokenizer([text] * 5, 262) for text in ("abab", "abab", "cdcd"))
    assert first.encode_text("abab") == other.encode_text("cdcd")
    assert digest_tokenizer(first) == digest_tokenizer(again)
    assert digest_tokenizer(first) != digest_tokenizer(other)

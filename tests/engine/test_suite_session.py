"""A run of the GPU suite from end to end, on a CPU that stands for a GPU; and what the commands say
where there is none."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_parts import CEILINGS, KEY, MACHINE, ROWS, proof, record

from fuserl.bench import run
from fuserl.bench.ops import providers
from fuserl.bench.suite import cases, extension, machine, session, without_gpu
from fuserl.bench.suite.cases import Part
from fuserl.bench.suite.extension import Build
from fuserl.bench.suite.part import time_part
from fuserl.bench.suite.proof import Proof
from fuserl.bench.suite.session import run_all, run_session
from fuserl.bench.suite.without_gpu import CHECKS, Check, run_without_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A session with a known machine and one tiny case; what it asked of the tests."""
    asked: list[Any] = []

    def prove(root: Path, ops: Any, deadline: float, kept: Path, key: Any) -> Proof:
        asked.append((list(ops), deadline - time.monotonic(), kept, key))
        return proof("token_logprobs")

    monkeypatch.setattr(session, "prove", prove)
    monkeypatch.setattr(session, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(machine, "describe", lambda root, device, commit: {**MACHINE, "x": device})
    monkeypatch.setattr(extension, "build", lambda root: Build("cuda", True, 3.0, ""))
    monkeypatch.setattr(cases, "ROUNDS", 3)
    monkeypatch.setattr(cases, "timed_providers", lambda op, _: providers(op, "fuserl-reference"))
    monkeypatch.setitem(session.PARTS, "ops", Part("ops", lambda: [ROWS], "ms: of a call"))
    return asked


def test_a_session_builds_proves_times_and_sums_up(
    as_on_gpu: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run_session(
        ROOT,
        part="ops",
        ops=["token_logprobs"],
        deadline=time.monotonic() + 100,
        out=tmp_path,
        commit="abc",
    )
    assert code == 0
    ((ops, seconds, kept, key),) = as_on_gpu
    assert (ops, dict(key)) == (["token_logprobs"], KEY)
    assert 60 < seconds <= 70
    assert kept == ROOT / "build" / "gpu" / "proof.json"
    out = capsys.readouterr().out
    for told in ("native modules (cuda): built", "ceilings: copy", "token_logprobs 3", ROWS.title):
        assert told in out
    assert (tmp_path / "summary.md").exists()
    assert json.loads((tmp_path / "ops.json").read_text())["is_finished"]


def test_a_case_that_never_ends_leaves_the_summary_of_the_others(
    as_on_gpu: list[Any], tmp_path: Path
) -> None:
    kept = record(tmp_path, "ops", proof("token_logprobs"))
    assert time_part(session.PARTS["ops"], kept, time.monotonic() + 60) == []
    code = (
        "import ctypes, sys, time; from pathlib import Path\n"
        "from fuserl.bench.suite.session import _ended_after\n"
        "with _ended_after(time.monotonic() + 30, Path(sys.argv[1])): pass\n"
        "with _ended_after(time.monotonic() + 0.2, Path(sys.argv[1])):\n"
        "    lock = ctypes.create_string_buffer(64)\n"
        "    while True: ctypes.CDLL(None).pthread_mutex_lock(lock)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{ROOT / 'kernels'}"},
    )
    assert done.returncode == 1
    assert 'File "<string>", line 6' in done.stderr  # where it hung
    assert "the last case did not end, and is given up\n**ops**" in done.stdout
    assert ROWS.title in (tmp_path / "summary.md").read_text()


def test_a_folder_that_cannot_be_written_is_told_before_minutes_are_spent(
    as_on_gpu: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    end = time.monotonic() + 100
    with pytest.raises(OSError):
        run_session(ROOT, part="ops", ops=[], deadline=end, out=tmp_path / "file", commit=None)
    assert as_on_gpu == []


def test_a_part_has_no_more_than_its_seconds(as_on_gpu: list[Any], tmp_path: Path) -> None:
    end = time.monotonic() + 10_000
    assert run_session(ROOT, part="ops", ops=[], deadline=end, out=tmp_path, commit=None) == 0
    ((_, seconds, *_),) = as_on_gpu
    assert seconds <= 0.7 * session.PART_SECONDS


def test_red_tests_are_told_by_the_exit_code(
    as_on_gpu: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    red = proof(red={"token_logprobs": "1 of 1 tests failed, first test_x"})
    monkeypatch.setattr(session, "prove", lambda *rest: red)
    end = time.monotonic() + 100
    assert run_session(ROOT, part="ops", ops=[], deadline=end, out=tmp_path, commit=None) == 1
    assert json.loads((tmp_path / "ops.json").read_text())["cases"] == []
    assert ROWS.title in (tmp_path / "summary.md").read_text()


def test_all_parts_run_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def started(command: list[str]) -> Any:
        commands.append(command)
        return type("Done", (), {"returncode": len(commands) % 2})

    monkeypatch.setattr(session.subprocess, "run", started)
    assert run_all(ROOT, ["--out", "x"], time.monotonic() + 300) == 1
    assert [command[3] for command in commands] == list(session.PARTS)
    assert [int(command[5]) for command in commands] == pytest.approx([100, 150, 300], abs=1)
    assert all(command[-2:] == ["--out", "x"] for command in commands)
    assert run_all(ROOT, [], time.monotonic()) == 1
    assert capsys.readouterr().out.count("the seconds were used up") == 3


def gpu_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu"), run_name="__main__")
    return int(end.value.code or 0)


def test_the_command_refuses_what_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_command(monkeypatch, "--budget", "0") == 2
    assert "--budget must be positive, got 0.0" in capsys.readouterr().err
    assert gpu_command(monkeypatch, "--op", "softmax") == 2
    assert "--op must be one of token_logprobs," in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_that_nothing_was_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = Check("good", ("-c", "import fuserl, fuserl_kernels"))
    bad = Check("bad", ("-c", "import os; assert os.environ['TRITON_INTERPRET'] == '0'"), True)
    monkeypatch.setattr(without_gpu, "CHECKS", (good,))
    assert gpu_command(monkeypatch, "--part", "ops", "--out", str(tmp_path)) == 0
    said = "torch sees no CUDA device: nothing was timed, and no GPU test has run."
    assert said in capfd.readouterr().out
    monkeypatch.setattr(without_gpu, "CHECKS", (good, bad))
    assert run_without_gpu(ROOT, tmp_path) == 1
    out = capfd.readouterr().out
    assert "passed: good\nFAILED: bad" in out
    assert said in out
    written = json.loads((tmp_path / "without_gpu.json").read_text())
    assert written["passed"] == {"good": True, "bad": False}
    assert "cases" not in written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["without_gpu.json"]


def test_the_checks_without_a_gpu_name_what_exists() -> None:
    """Not run here: they are most of this suite themselves."""
    for check in CHECKS:
        if check.command[1] == "pytest":
            assert (ROOT / check.command[3]).is_dir()
        else:
            assert runpy.run_module(check.command[1], run_name="imported")["main"]


def test_the_machine_is_told_apart_by_its_sources(tmp_path: Path) -> None:
    (tmp_path / "kernels" / "__pycache__").mkdir(parents=True)
    (tmp_path / "setup.py").write_text("a")
    source = tmp_path / "kernels" / "x.py"
    source.write_text("b")
    first = machine.source_digest(tmp_path)
    (tmp_path / "kernels" / "_native.so").write_text("built")
    (tmp_path / "kernels" / "__pycache__" / "x.pyc").write_text("cached")
    (tmp_path / "README.md").write_text("told")
    assert machine.source_digest(tmp_path) == first
    source.write_text("c")
    assert machine.source_digest(tmp_path) != first
    source.write_text("b")
    source.rename(tmp_path / "kernels" / "y.py")
    assert machine.source_digest(tmp_path) != first
    modules = tmp_path / "kernels" / "fuserl_kernels"
    modules.mkdir()
    assert machine.built_modules(tmp_path) == {}
    (modules / "_native.cpython-312.so").write_text("built")
    before = machine.built_modules(tmp_path)
    assert list(before) == ["_native.cpython-312.so"]
    (modules / "_native.cpython-312.so").write_text("built again")
    assert machine.built_modules(tmp_path) != before
    found = machine.describe(ROOT, "cpu", "a commit")
    assert found["commit"] == "a commit"
    assert found["sources"] == machine.source_digest(ROOT)
    assert "gpu" not in found


def test_a_build_that_fails_is_told_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extension.shutil, "which", lambda name, path=None: None)
    assert str(extension.build(tmp_path)) == (
        "native modules (none): not built, there is no C++ compiler"
    )
    monkeypatch.setattr(
        extension.shutil, "which", lambda name, path=None: name if name == "g++" else None
    )
    (tmp_path / "setup.py").write_text(
        "import os, sys\nassert os.environ['FUSERL_BUILD'] == 'cpu'\nsys.exit('no header')\n"
    )
    assert str(extension.build(tmp_path)) == (
        "native modules (cpu): not built, the build failed:\nno header"
    )
    monkeypatch.setattr(extension.shutil, "which", lambda name, path=None: name)
    (tmp_path / "setup.py").write_text(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    monkeypatch.setattr(extension, "_LONGEST_SECONDS", 0.5)
    began = time.monotonic()
    assert str(extension.build(tmp_path)).endswith("not built, not done after 0 s")
    assert time.monotonic() - began < 10  # nor is the compiler that it started waited for
    monkeypatch.undo()
    monkeypatch.setattr(extension.shutil, "which", lambda name, path=None: name)
    (tmp_path / "setup.py").write_text(
        "import os, sys\nassert os.environ['FUSERL_BUILD'] == 'cuda'\n"
        "assert '--inplace' in sys.argv\n"
    )
    assert str(extension.build(tmp_path)).startswith("native modules (cuda): built in place, ")

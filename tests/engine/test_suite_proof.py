"""The licence to show a number: what GPU tests must have said, and that nothing is guessed."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from suite_parts import KEY, proof

from fuserl.bench.suite import proof as suite_proof
from fuserl.bench.suite.proof import judge, prove

ROOT = Path(__file__).parents[2]


def collected(name: str, *ops: str) -> dict[str, Any]:
    return {"kind": "collected", "id": name, "ops": list(ops), "large": False}


def outcome(name: str, what: str, reason: str = "") -> dict[str, Any]:
    line = {"kind": "outcome", "id": name, "ops": None, "outcome": what, "seconds": 0.1}
    return {**line, "reason": reason}


LINES = [collected("a", "glu", "rotary"), collected("b", "glu"), collected("c", "rms_norm")]
PASSED = [outcome("a", "passed"), outcome("b", "passed"), outcome("c", "passed")]


def test_an_op_is_green_where_all_its_tests_passed() -> None:
    found = judge(LINES + PASSED, KEY, is_whole=True)
    assert found.green == {"glu": 2, "rotary": 1, "rms_norm": 1}
    assert found.red == {}
    assert found.why_red(["glu", "rotary"]) is None
    assert found.why_red(["glu", "gae"]) == "gae: no test of it has run"


@pytest.mark.parametrize(
    ("lines", "op", "reason"),
    [
        ([*PASSED, outcome("b", "failed", "wrong")], "glu", "1 of 2 tests failed, first b"),
        ([outcome("b", "failed"), *PASSED], "glu", "1 of 2 tests failed, first b"),
        (PASSED[1:], "rotary", "1 of 1 tests did not run to their end, first a"),
        ([*PASSED[:2], outcome("c", "skipped")], "rms_norm", "all of 1 tests were skipped"),
    ],
)
def test_else_it_is_red_with_the_reason(lines: list[dict[str, Any]], op: str, reason: str) -> None:
    found = judge(LINES + lines, KEY, is_whole=True)
    assert found.red[op] == reason
    assert op not in found.green
    assert found.why_red([op]) == f"{op}: {reason}"
    assert f"RED {op}: {reason}" in str(found)


def test_a_skip_among_passes_is_no_harm() -> None:
    lines = [*LINES, outcome("a", "passed"), outcome("b", "skipped"), outcome("c", "passed")]
    assert judge(lines, KEY, is_whole=True).green["glu"] == 1


def test_tests_that_nobody_knows_make_everything_red() -> None:
    broken = {"kind": "collection_error", "id": "test_x.py", "reason": "E  ImportError: gone"}
    found = judge([*LINES, broken, *PASSED], KEY, is_whole=True)
    assert "test_x.py: E  ImportError: gone" in str(found.why_red(["glu"]))
    begun, end = {"kind": "session", "selection": "gpu"}, {"kind": "end", "exit_code": 3}
    for lines in ([], [begun], [begun, end]):
        found = judge(lines, KEY, is_whole=True)
        assert found.why_red(["glu"]) == "tests could not be collected: none was found"


def test_outcomes_that_were_cut_off_answer_nothing() -> None:
    assert judge(LINES + PASSED, KEY, is_whole=True).answers(())
    assert judge(LINES + PASSED, KEY, is_whole=False).answers(["glu"])
    assert not judge(LINES + PASSED, KEY, is_whole=False).answers(["glu", "gae"])
    assert not judge(LINES + PASSED[1:], KEY, is_whole=True).answers(["glu"])
    assert not judge([], KEY, is_whole=True).answers(())


def test_outcomes_of_some_ops_are_added_to_earlier_ones() -> None:
    earlier = proof("glu", "gae", red={"rotary": "1 of 1 tests failed"})
    again = judge([LINES[0], PASSED[0]], KEY, is_whole=False)
    found = again.over(earlier)
    assert found.green == {"gae": 3, "glu": 1, "rotary": 1}
    assert found.red == {}
    assert found.is_whole


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project whose GPU tests need no GPU."""
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(ROOT / "tests" / "outcome_report.py", tests)
    (tests / "conftest.py").write_text(
        "import sys, os\n"
        "sys.path.insert(0, os.path.dirname(__file__))\n"
        "import outcome_report\n"
        "pytest_addoption = outcome_report.add_options\n"
        "pytest_configure = outcome_report.register\n"
        "def pytest_collection_modifyitems(config, items):\n"
        "    outcome_report.select(config, items)\n"
    )
    (tests / "test_ops.py").write_text(
        "import ctypes, os, time, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.mark.covers('glu')\n"
        "def test_glu(): pass\n"
        "@pytest.mark.covers('glu')\n"
        "@pytest.mark.large\n"
        "def test_glu_large(): open('large_ran', 'w').close()\n"
        "@pytest.mark.covers('gae')\n"
        "def test_gae(): assert not os.environ.get('BREAK_GAE'), 'gae is broken'\n"
        "@pytest.mark.covers('layer_norm')\n"
        "def test_stuck():\n"
        "    lock = ctypes.create_string_buffer(64)\n"
        "    for _ in range(1 + ('STUCK' in os.environ)):\n"
        "        ctypes.CDLL(None).pthread_mutex_lock(lock)\n"
        "@pytest.mark.covers('rotary')\n"
        "def test_slow(): time.sleep(float(os.environ.get('SLEEP', '0')))\n"
    )
    markers = "gpu:\n    large:\n    covers(*ops):"
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nmarkers =\n    {markers}\n")
    return tmp_path


def run(tree: Path, *ops: str, seconds: float = 120, key: dict[str, Any] = KEY) -> Any:
    return prove(tree, ops, time.monotonic() + seconds, tree / "build" / "proof.json", key)


def test_tests_are_run_once_for_the_same_sources(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = run(tree)
    assert found.green == {"glu": 2, "gae": 1, "layer_norm": 1, "rotary": 1}
    assert (tree / "large_ran").exists()
    monkeypatch.setenv("BREAK_GAE", "1")
    capfd.readouterr()
    assert run(tree) == run(tree, "gae") == found
    assert "as they were, for the same sources" in capfd.readouterr().out
    found = run(tree, key={**KEY, "sources": "changed"})
    assert "gae is broken" in found.failures[0]["reason"]
    assert set(found.green) == {"glu", "layer_norm", "rotary"}
    assert set(found.red) == {"gae"}


def test_only_the_tests_of_the_ops_that_were_asked_for(tree: Path) -> None:
    found = run(tree, "gae")
    assert found.green == {"gae": 1}
    assert not found.is_whole
    assert found.why_red(["glu"]) == "glu: no test of it has run"
    assert not (tree / "large_ran").exists()
    assert run(tree, "gae", "rotary").green == {"gae": 1, "rotary": 1}


def test_a_test_that_waits_for_ever_is_red_alone(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a kernel that never ends: no signal reaches Python."""
    pytest.importorskip("xdist", reason="a worker can be replaced, a process alone cannot")
    pytest.importorskip("pytest_timeout", reason="else it is ended with all others")
    monkeypatch.setenv("STUCK", "1")
    monkeypatch.setattr(suite_proof, "_ONE_TEST_SECONDS", 3)
    found = run(tree)
    assert "1 of 1 tests failed" in found.red["layer_norm"]
    assert set(found.green) == {"gae", "glu", "rotary"}
    assert found.is_complete


def test_what_runs_out_of_time_is_red(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEP", "1000")
    began = time.monotonic()
    found = run(tree, seconds=25)
    assert time.monotonic() - began < 60  # killed, not waited for
    assert "did not run to their end" in found.red["rotary"]
    # Tests with large tensors come last, and are known to be missing.
    assert found.red["glu"] == (
        "1 of 2 tests did not run to their end, first tests/test_ops.py::test_glu_large"
    )
    assert set(found.green) == {"gae", "layer_norm"}
    monkeypatch.setenv("SLEEP", "0")
    assert run(tree).red == {}  # what was cut off is run again
    sleepers = [
        name
        for name in os.listdir("/proc")
        if name.isdigit() and str(tree).encode() in _environment(name)
    ]
    assert sleepers == []


def _environment(process: str) -> bytes:
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return b""

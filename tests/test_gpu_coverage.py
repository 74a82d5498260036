"""What the tests on a GPU cover, read off their collection: who times an op relies on it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fuserl_kernels as fk
from fuserl.bench.ops import OPS

ROOT = Path(__file__).parents[1]
NO_OPS = {"PRESETS", "use_backend"}  # public names that compute nothing
IN_CUDA = {"native sample_tokens"}  # implementations beside the one that runs by itself
KNOWN = {*fk.__all__, "rollout", *IN_CUDA} - NO_OPS
LARGE_ENOUGH = {  # ops whose tensors grow past 2^31 elements
    "decode_attention", "discounted_returns", "gae", "glu", "kl_penalty", "layer_norm",
    "linear_policy_loss", "linear_token_logprobs", "masked_moments", "masked_whiten",
    "policy_loss", "ppo_loss", "rewards_to_advantages", "rms_norm", "rotary", "rotary_kv_write",
    "sample_tokens", "shape_rewards", "token_logprobs", "value_loss",
}  # fmt: skip


def lines_of(report: Path, *arguments: str, cwd: Path = ROOT) -> list[dict[str, Any]]:
    """Those of the report of a run of pytest."""
    environment = os.environ | {"FUSERL_TEST_REPORT": str(report)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=300)
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    report = tmp_path_factory.mktemp("report") / "gpu.jsonl"
    lines = lines_of(report, "-m", "gpu", "--collect-only", str(ROOT / "tests"))
    assert lines[0]["kind"] == "session"
    assert lines[-1] == {"kind": "end", "exit_code": 0}
    assert {line["kind"] for line in lines[1:-1]} == {"collected"}
    return lines[1:-1]


def test_each_names_what_it_covers(collected: list[dict[str, Any]]) -> None:
    for line in collected:
        assert line["ops"], f"{line['id']} covers nothing"
        assert KNOWN.issuperset(line["ops"]), line


def test_each_op_is_covered(collected: list[dict[str, Any]]) -> None:
    covered = {op for line in collected for op in line["ops"]}
    assert covered == KNOWN
    assert covered.issuperset(OPS)


def test_what_can_be_large_is_tried_large(collected: list[dict[str, Any]]) -> None:
    assert {op for line in collected if line["large"] for op in line["ops"]} == (
        LARGE_ENOUGH | IN_CUDA
    )


OUTCOMES = """
import pytest
pytestmark = [pytest.mark.gpu, pytest.mark.covers("glu")]

@pytest.fixture
def breaks_afterwards():
    yield
    raise RuntimeError("afterwards")

def test_good(): pass
def test_bad(): assert 1 == 2
def test_left_out(): pytest.skip("no reason")
def test_ends_badly(breaks_afterwards): pass
"""
DEADLY = """
def test_dies():
    import os
    os._exit(1)
"""
CONFTEST = """
import sys
sys.path.insert(0, {root!r})
import outcome_report

pytest_addoption = outcome_report.add_options

def pytest_configure(config):
    for marker in ("gpu", "large", "covers(*ops)"):
        config.addinivalue_line("markers", marker)
    outcome_report.register(config)

def pytest_collection_modifyitems(config, items):
    outcome_report.select(config, items)
    for item in items:
        item.user_properties.append(("ops", outcome_report.ops_of(item)))
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "two workers"])
def test_the_report_says_what_each_test_came_to(tmp_path: Path, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist", reason="without pytest-xdist tests run in one process only")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT / "tests")))
    (tmp_path / "test_some.py").write_text(OUTCOMES + (DEADLY if workers else ""))
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    arguments = ["--continue-on-collection-errors", *workers, str(tmp_path)]
    lines = lines_of(tmp_path / "report.jsonl", *arguments, cwd=tmp_path)
    assert lines[0]["kind"] == "session"
    assert lines[-1] == {"kind": "end", "exit_code": 1}
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in lines[1:-1]:
        by_kind.setdefault(line["kind"], []).append(line)
    if workers:  # where a worker dies its test has failed, and another worker goes on
        dead = [line for line in by_kind["outcome"] if line["id"].endswith("test_dies")]
        assert [(line["outcome"], line["ops"]) for line in dead] == [("failed", None)]
        by_kind["outcome"].remove(dead[0])
    assert len(by_kind["collected"]) == 4 + bool(workers)
    (broken,) = by_kind["collection_error"]
    assert broken["id"].endswith("test_broken.py")
    assert "no_such_module" in broken["reason"]
    found = sorted((line["id"].split("::")[1], line["outcome"]) for line in by_kind["outcome"])
    assert found == [
        ("test_bad", "failed"),
        ("test_ends_badly", "failed"),
        ("test_ends_badly", "passed"),
        ("test_good", "passed"),
        ("test_left_out", "skipped"),
    ]
    assert all(line["ops"] == ["glu"] for line in by_kind["outcome"])
    reasons = {line["id"].split("::")[1]: line["reason"] for line in by_kind["outcome"]}
    assert "assert 1 == 2" in reasons["test_bad"]
    assert "no reason" in reasons["test_left_out"]

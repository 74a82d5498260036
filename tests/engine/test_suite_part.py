"""A part of the GPU suite on tiny cases: what is written, what is left out, and why."""

import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from suite_parts import CEILINGS, ROWS, STEPS, proof, record

from fuserl.bench import run
from fuserl.bench.ops import providers
from fuserl.bench.output import Table, WrongAnswer
from fuserl.bench.rivals import Unavailable
from fuserl.bench.suite import cases, part
from fuserl.bench.suite.cases import DECODING, AnyCase, Part
from fuserl.bench.suite.part import time_part

OTHER = ROWS.__class__(**{**ROWS.to_json(), "num_rows": 5})
GREEN = proof("token_logprobs", *DECODING)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds: ceilings, and rivals that compile."""
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(cases, "ROUNDS", 3)
    monkeypatch.setattr(cases, "timed_providers", lambda op, _: providers(op, "fuserl-reference"))


def a_part(*chosen: AnyCase) -> Part:
    return Part("ops", lambda: chosen, "ms: of a step")


def soon() -> float:
    return time.monotonic() + 60


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "ops.json").read_text())


def test_each_case_is_written_with_all_its_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert time_part(a_part(ROWS, STEPS), record(tmp_path, "ops", GREEN), soon()) == []
    found = content(tmp_path)
    assert found["is_finished"]
    assert [case["kind"] for case in found["cases"]] == ["op", "decode_steps"]
    assert found["cases"][0]["needs"] == ["token_logprobs"]
    results = found["cases"][0]["results"]
    assert [result["provider"] for result in results] == ["fuserl-reference", "torch"]
    assert all(len(result["samples_ms"]) >= 3 for result in results)
    assert found["proof"]["green"]["token_logprobs"] == 3
    out = capsys.readouterr().out
    assert ROWS.title in out
    assert "ms: of a step" in out


def test_an_op_with_red_tests_is_not_timed_and_the_others_are(tmp_path: Path) -> None:
    red = proof(*DECODING, red={"token_logprobs": "1 of 9 tests failed, first test_rows"})
    assert time_part(a_part(ROWS, STEPS), record(tmp_path, "ops", red), soon()) == []
    found = content(tmp_path)
    assert [case["kind"] for case in found["cases"]] == ["decode_steps"]
    assert found["not_timed"] == [
        {
            "title": ROWS.title,
            "reason": "its tests are not green (token_logprobs: 1 of 9 tests failed, "
            "first test_rows)",
        }
    ]


def fails(error: BaseException, real: Callable[..., Table]) -> Callable[..., Table]:
    """For OTHER, and nothing else."""

    def measure(case: AnyCase, *rest: Any) -> Table:
        if case is OTHER:
            raise error
        return real(case, *rest)

    return measure


@pytest.mark.parametrize(
    ("error", "reason", "is_wrong"),
    [
        (WrongAnswer("triton: error 3"), "WrongAnswer: triton: error 3", True),
        (RuntimeError("no such kernel\nat line 3"), "RuntimeError: no such kernel", True),
        (Unavailable("transformers cannot be imported"), "transformers cannot be", False),
    ],
)
def test_a_case_that_fails_stops_no_other(
    error: Exception,
    reason: str,
    is_wrong: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(part, "measure", fails(error, part.measure))
    wrong = time_part(a_part(OTHER, ROWS), record(tmp_path, "ops", GREEN), soon())
    assert bool(wrong) == is_wrong
    found = content(tmp_path)
    assert [case["title"] for case in found["cases"]] == [ROWS.title]
    assert found["not_timed"][0]["title"] == OTHER.title
    assert reason in found["not_timed"][0]["reason"]
    assert "line 3" not in found["not_timed"][0]["reason"]


def test_a_run_cut_off_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(part, "measure", fails(KeyboardInterrupt(), part.measure))
    with pytest.raises(KeyboardInterrupt):
        time_part(a_part(ROWS, OTHER), record(tmp_path, "ops", GREEN), soon())
    found = content(tmp_path)
    assert [case["title"] for case in found["cases"]] == [ROWS.title]
    assert not found["is_finished"]


def test_nothing_is_asked_of_a_device_that_answers_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    wrong = time_part(a_part(ROWS, OTHER), record(tmp_path, "ops", GREEN), soon())
    lost = f"the device answers no more since {ROWS.title}"
    assert wrong == [lost]
    found = content(tmp_path)
    assert not found["is_finished"]
    assert [case["title"] for case in found["cases"]] == [ROWS.title]
    assert found["not_timed"] == [{"title": OTHER.title, "reason": lost}]


def test_nothing_of_a_case_is_left_for_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left: list[weakref.ref[Any]] = []
    found: list[bool] = []

    class Model:
        def __init__(self) -> None:
            self.itself = self  # nothing but the collector frees it

    def measure(case: AnyCase, *rest: Any) -> Table:
        found.extend(model() is not None for model in left)
        left.append(weakref.ref(Model()))
        raise Unavailable("once")

    resets: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    monkeypatch.setattr(part, "measure", measure)
    time_part(a_part(ROWS, OTHER), record(tmp_path, "ops", GREEN), soon())
    assert found == [False]
    assert len(resets) == 2


def test_what_the_seconds_do_not_reach_is_named(tmp_path: Path) -> None:
    time_part(a_part(ROWS, STEPS), record(tmp_path, "ops", GREEN), time.monotonic())
    found = content(tmp_path)
    assert found["cases"] == []
    assert {left["reason"] for left in found["not_timed"]} == {"the seconds were used up"}
    assert len(found["not_timed"]) == 2


def test_only_the_ops_that_were_asked_for(tmp_path: Path) -> None:
    time_part(a_part(ROWS, STEPS), record(tmp_path, "ops", GREEN), soon(), ["rollout"])
    found = content(tmp_path)
    assert [case["kind"] for case in found["cases"]] == ["decode_steps"]
    assert found["not_timed"] == []

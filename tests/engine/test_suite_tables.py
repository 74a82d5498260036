"""The reader of the GPU suite's files: what it shows, and what it never does."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from suite_parts import CEILINGS, PHASES, ROWS, STEPS, proof, record

from fuserl.bench import decode_steps, rl_phases, run
from fuserl.bench.ops import default_provider, providers
from fuserl.bench.suite.cases import DECODING, TRAINING
from fuserl.bench.suite.part import Record
from fuserl.bench.suite.plots import bars, draw
from fuserl.bench.suite.reader import read_folder, result_folders
from fuserl.bench.suite.tables import BEGIN, END, readme_block, replace_block, write_summary

ROOT = Path(__file__).parents[2]
GREEN = proof("token_logprobs", *DECODING, *TRAINING)
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def timed() -> list[dict[str, Any]]:
    """An op, decode steps and steps of GRPO, measured on this machine's CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure_ceilings", lambda device, dtype: CEILINGS)
        names = f"torch,{default_provider(ROWS)}"
        op = run.run_case(ROWS, providers("token_logprobs", names), CEILINGS, 3, 1.0)
    kept = Record(Path(), "ops", {}, CEILINGS, GREEN)
    kept.keep(ROWS, op)
    kept.keep(STEPS, decode_steps.run_case(STEPS, CEILINGS, 1.0))
    kept.keep(PHASES, rl_phases.run_case(PHASES, CEILINGS, 1.0))
    return json.loads(json.dumps(kept.cases))


def write(folder: Path, timed: list[dict[str, Any]], **changes: Any) -> Record:
    found = record(folder, "ops", changes.pop("proof", GREEN), **changes)
    found.cases = timed
    found.write()
    return found


def test_the_summary_has_a_row_for_all_that_was_timed(
    timed: list[dict[str, Any]], tmp_path: Path
) -> None:
    write(tmp_path, timed)
    text = write_summary(tmp_path)
    assert (tmp_path / "summary.md").read_text() == f"{text}\n"
    assert (
        "a GPU, torch 2.11.0, Triton 3.6.0, 2026-01-02, commit 0123456789; copy 0.00 TB/s" in text
    )
    name = default_provider(ROWS)
    assert f"| {ROWS.title} | {name.removeprefix('fuserl-')} |" in text
    assert text.count("| tiny | 2 |") == 2
    assert f"{PHASES.title}:\n\n| phase | ms |" in text
    for phase in ("rollout", "score", "shape", "update", "step"):
        assert f"\n| {phase} | " in text
    (row,) = [line for line in text.splitlines() if ROWS.title in line]
    ours = next(r for r in timed[0]["results"] if r["provider"] == name)
    torch = next(r for r in timed[0]["results"] if r["provider"] == "torch")
    assert f"| {torch['median_ms'] / ours['median_ms']:.2f}x |" in row
    assert f"| {timed[0]['floor_ms'] / ours['median_ms']:.0%} |" in row


def test_ours_is_what_a_user_gets_though_another_of_ours_be_faster(
    timed: list[dict[str, Any]], tmp_path: Path
) -> None:
    def result(provider: str, milliseconds: float, is_ours: bool) -> dict[str, Any]:
        times = {"samples_ms": [milliseconds], "median_ms": milliseconds}
        quartiles = [milliseconds, milliseconds]
        return {"provider": provider, "is_ours": is_ours, "quartiles_ms": quartiles, **times}

    results = [
        result("fuserl-native", 1.0, True),
        result("fuserl-triton", 4.0, True),
        result("torch", 8.0, False),
    ]
    case = {**timed[0], "default": "fuserl-triton", "floor_ms": 3.0, "results": results}
    write(tmp_path, [case])
    rows = [line for line in write_summary(tmp_path).splitlines() if ROWS.title in line]
    assert "| triton | 4 [4, 4] | 3 | 75% | 2.00x | - | - |" in rows[0]
    assert "| native (asked for) | 1 [1, 1] | 3 |" in rows[1]
    (bar,) = bars(read_folder(tmp_path)[0])
    assert bar[1] == 0.75
    full = {**results[1], "samples_ms": [], "status": "out of memory", "reason": "9 GB"}
    write(tmp_path, [{**case, "results": [results[0], full]}])
    assert f"\n- {ROWS.title}: fuserl-triton: out of memory, 9 GB" in write_summary(tmp_path)
    assert bars(read_folder(tmp_path)[0]) == []
    write(tmp_path, [{**case, "results": [results[0]]}])
    assert "fuserl-triton, which a user gets, was not timed" in write_summary(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"proof": proof(*DECODING, red={"token_logprobs": "2 of 5 tests failed"})}, "2 of 5"),
        ({"proof": proof(*DECODING)}, "token_logprobs: no test of it has run"),
        ({"sources": "another"}, "its tests were those of other sources (abc)"),
        ({"modules": {}}, "its tests were those of other native modules ({'_native.so': 'def'})"),
        ({"proof": proof("token_logprobs", *DECODING, errors=["test_x.py: gone"])}, "test_x.py"),
    ],
)
def test_a_number_without_green_tests_is_never_shown(
    changes: dict[str, Any], reason: str, timed: list[dict[str, Any]], tmp_path: Path
) -> None:
    write(tmp_path, timed, **changes)
    text = write_summary(tmp_path)
    assert f"| {ROWS.title}" not in text
    assert f"- {ROWS.title}: " in text
    assert reason in text
    assert ROWS.title not in readme_block([tmp_path])
    hidden = dict(read_folder(tmp_path)[0].hidden)
    assert ROWS.title in hidden


def test_cuda_without_green_tests_of_its_own_is_not_shown(
    timed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """And with them it has a row of its own, below that of what runs by itself."""
    default = next(r for r in timed[0]["results"] if r["provider"] == timed[0]["default"])
    triton = {**default, "provider": "fuserl-triton"}
    native = {**default, "provider": "fuserl-native", "median_ms": 1e-3}
    case = {**timed[0], "default": "fuserl-triton", "results": [triton, native]}
    case["case"] = {**case["case"], "device": "cuda"}
    write(tmp_path, [case])
    text = write_summary(tmp_path)
    assert f"| {ROWS.title} | triton |" in text
    assert "native" not in text
    write(tmp_path, [case], proof=proof("token_logprobs", "native token_logprobs"))
    rows = [line for line in write_summary(tmp_path).splitlines() if ROWS.title in line]
    assert [row.split(" | ")[1] for row in rows] == ["triton", "native (asked for)"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ops.json").write_text('{"format": 1, "cases": []}')
    with pytest.raises(ValueError, match=r"ops\.json: not a file of the GPU suite"):
        read_folder(tmp_path)


def test_the_readme_has_a_case_an_op_and_says_when_there_is_none(
    timed: list[dict[str, Any]], tmp_path: Path
) -> None:
    again = {**timed[0], "title": "token_logprobs once more"}
    write(tmp_path, [timed[0], again, *timed[1:]])
    block = readme_block([tmp_path])
    assert ROWS.title in block
    assert "once more" not in block
    assert readme_block([]).startswith("**No GPU number exists yet**")
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replace_block(text, "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    with pytest.raises(ValueError, match="has no lines"):
        replace_block("a text", "new")


def test_the_committed_readme_says_what_the_committed_results_say() -> None:
    folders = result_folders(ROOT / "benchmarks" / "results")
    text = (ROOT / "README.md").read_text()
    assert replace_block(text, readme_block(folders)) == text


def test_the_plot_is_drawn_of_what_may_be_shown(
    timed: list[dict[str, Any]], tmp_path: Path
) -> None:
    write(tmp_path, timed)
    assert draw(tmp_path, tmp_path / "limits.png")
    assert (tmp_path / "limits.png").read_bytes().startswith(PNG)
    write(tmp_path, timed, proof=proof())
    assert not draw(tmp_path, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_command(
    timed: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tables(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tables", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "benchmarks" / "tables"), run_name="__main__")
        return int(end.value.code or 0)

    write(tmp_path, timed)
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    assert tables(str(tmp_path), "--plot", "--readme", str(readme)) == 0
    assert ROWS.title in capsys.readouterr().out
    assert (tmp_path / "limits.png").exists()
    assert len(readme.read_text().splitlines()) > 3
    assert tables() == 2
    assert "a folder, or --readme" in capsys.readouterr().err
    assert tables(str(tmp_path / "absent")) == 2
    assert "absent is no folder" in capsys.readouterr().err

"""The training-step benchmark: its rows, its truth, who is refused, and what it tells."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl import cli
from fuserl.bench import training_step
from fuserl.bench.output import WrongAnswer
from fuserl.bench.training_problem import Answer, StepCase, StepProblem, make_rows
from fuserl.bench.training_providers import PROVIDERS, FuserlStep, TransformersStep
from fuserl.bench.training_step import StepReport, StepResult, cases_of, run_case
from fuserl.bench.truth import Error
from fuserl.config import BenchConfig

pytest.importorskip("transformers", reason="the benchmark's rival is not installed")


def tiny(batch: str = "ragged", dtype: str = "fp32") -> StepCase:
    return StepCase(model="tiny", batch=batch, dtype=dtype, device="cpu", num_rows=4, max_length=24)


@pytest.fixture(scope="module")
def problem() -> StepProblem:
    return StepProblem(tiny())


def test_rows_are_ragged_or_equal_with_as_many_tokens() -> None:
    lengths: dict[str, list[int]] = {}
    for batch in ("ragged", "equal"):
        case = StepCase(model="3M", batch=batch, dtype="fp32", device="cpu")
        rows = make_rows(case, 4096)
        assert rows == make_rows(case, 4096)
        lengths[batch] = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
        assert max(max(row.completion_ids) for row in rows) < 4096
    assert len(set(lengths["equal"])) == 1
    assert max(lengths["ragged"]) > 4 * min(lengths["ragged"])
    assert sum(lengths["equal"]) == pytest.approx(sum(lengths["ragged"]), rel=0.02)


@pytest.mark.parametrize("dtype", list(PROVIDERS))
@pytest.mark.parametrize("batch", ["ragged", "equal"])
def test_every_provider_finds_the_truth(dtype: str, batch: str) -> None:
    problem = StepProblem(tiny(batch, dtype))
    bound = {"fp32": Error(1e-5, 1e-5), "bf16": Error(0.02, 0.05)}[dtype]
    for name, make in PROVIDERS[dtype].items():
        assert problem.error(make(problem).answer()).within(bound), name


def test_what_learns_other_tokens_is_wrong(problem: StepProblem) -> None:
    rows = [*problem.rows[1:], problem.rows[0]]
    shifted = StepProblem(tiny())
    shifted.rows = rows[:-1]
    error = problem.error(FuserlStep(shifted).answer())
    assert error.value > 1e-3
    assert error.gradient > 1e-2
    truth = problem.truth
    nan = {name: torch.full_like(g, torch.nan) for name, g in truth.gradients.items()}
    assert problem.error(Answer(truth.loss, nan)) == Error(0.0, float("inf"))


def test_a_step_trains_and_both_sides_move_alike(problem: StepProblem) -> None:
    """AdamW with the same numbers: the losses agree after steps too."""
    ours, theirs = FuserlStep(problem), TransformersStep(problem, torch.float32)
    for _ in range(3):
        torch.testing.assert_close(ours.run(), theirs.run())
    assert float(ours.run()) < problem.truth.loss
    assert ours.state_bytes == pytest.approx(theirs.state_bytes, rel=1e-3)


def test_a_wrong_answer_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(self: FuserlStep) -> Answer:
        return Answer(0.0, right(self).gradients)

    right = FuserlStep.answer
    monkeypatch.setattr(FuserlStep, "answer", off)
    with pytest.raises(WrongAnswer, match=r"nothing was timed, because fuserl errs by \d"):
        run_case(tiny(), 1, 1.0)


def test_the_command_writes_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_step, "cases_of", lambda config: [tiny(dtype=config.dtype)])
    out = tmp_path / "a" / "step.json"
    flags = ["bench", "training_step", "--dtype", "bf16", "--rounds", "1", "--json", str(out)]
    assert cli.main(flags) == 0
    told = capsys.readouterr().out
    assert "training step, tiny, ragged lengths, bf16 cpu" in told
    assert "| transformers-autocast |" in told
    (case,) = json.loads(out.read_text())["cases"]
    assert case["case"]["batch"] == "ragged"
    assert case["padded_tokens"] > case["num_tokens"] > case["num_completion_tokens"]
    results = {result["provider"]: result for result in case["results"]}
    assert set(results) == set(PROVIDERS["bf16"])
    assert results["transformers"]["speedup"] == 1.0
    assert all(len(result["samples_ms"]) >= 3 for result in results.values())
    # Weights, masters and two moments of ours; weights and two moments of bf16 theirs.
    ours, theirs = (results[name]["state_bytes"] for name in ("fuserl", "transformers"))
    assert ours / theirs == pytest.approx(14 / 6, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 3}, "num_rows makes no sense with training_step"),
        ({"providers": "torch"}, "providers makes no sense with training_step"),
        ({"model": "big"}, r"model of training_step must be one of \('all', 'tiny', '3M', '25M'\)"),
        ({"dtype": "fp16"}, r"dtype of training_step must be one of \('fp32', 'bf16'\)"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases_of(BenchConfig(op="training_step", **options))


def test_all_means_both_models_batches_and_dtypes() -> None:
    cases = cases_of(BenchConfig(op="training_step", device="cpu"))
    assert len({(case.model, case.batch, case.dtype) for case in cases}) == 8
    assert "tiny" not in {case.model for case in cases}


def test_speeds_are_compared_with_transformers() -> None:
    results = [
        StepResult("fuserl", Error(0.0, 0.0), samples_ms=[2.0, 1.0, 3.0]),
        StepResult("transformers", Error(0.0, 0.0), samples_ms=[5.0, 5.0, 5.0]),
    ]
    report = StepReport(tiny(), 10, 20, 5, 100, results)
    assert report.speedup(results[0]) == 2.5
    assert "2.50x" in report.table()

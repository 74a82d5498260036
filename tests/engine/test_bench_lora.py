"""The benchmark of a product with adapters: it checks before it times, and tells it all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fuserl import cli
from fuserl.bench import lora_linear
from fuserl.bench.lora_linear import LoraCase, Problem, cases_of, run_case
from fuserl.bench.output import WrongAnswer
from fuserl.config import BenchConfig

pytest.importorskip("peft", reason="PEFT is an oracle: the extra `oracles` has it")


@pytest.fixture(autouse=True)
def _no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak takes a collection of garbage for each provider, seconds in all."""
    monkeypatch.setattr(lora_linear, "why_not_measured", lambda device: "not here")


def tiny(**changes: Any) -> LoraCase:
    case = LoraCase(dtype="fp32", device="cpu", num_parts=3, num_rows=8, hidden_size=16, rank=2)
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("num_parts", [1, 3])
def test_every_provider_is_right_and_timed(dtype: str, num_parts: int) -> None:
    found = run_case(tiny(dtype=dtype, num_parts=num_parts), rounds=3, budget_seconds=0.1)
    assert [r.provider for r in found.results] == ["fuserl", "peft", "torch", "no adapter"]
    assert all(len(r.samples_ms) >= 3 and r.median_ms > 0 for r in found.results)
    assert found.results[-1].error is None
    peft = found.results[1]
    assert found.speedup(peft) == 1.0
    assert found.table().count("\n") == 7


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Problem) -> Any:
        call = lora_linear._torch(problem)
        run = call.run
        call.run = lambda: (run()[0] + 1, *run()[1:])  # type: ignore[method-assign]
        return call

    monkeypatch.setitem(lora_linear._PROVIDERS, "fuserl", wrong)
    with pytest.raises(WrongAnswer, match=r"nothing was timed, because fuserl errs by 1\.0e\+00"):
        run_case(tiny(), rounds=3, budget_seconds=0.1)


def test_the_command_writes_what_it_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lora.json"
    sizes = ["--num-rows", "8", "--hidden-size", "16", "--rounds", "3", "--budget-seconds", "0.1"]
    assert cli.main(["bench", "lora_linear", *sizes, "--dtype", "fp32", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    cases = json.loads(path.read_text())["cases"]
    assert [(c["case"]["rank"], c["case"]["num_parts"]) for c in cases] == [
        *((8, 1), (8, 3), (16, 1), (16, 3))
    ]
    assert printed.count("lora_linear fp32 N=8, D=16") == 4
    assert {r["provider"] for r in cases[0]["results"]} == set(lora_linear._PROVIDERS)


def test_options_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="top_p makes no sense with lora_linear"):
        cases_of(BenchConfig(op="lora_linear", top_p=0.5))
    with pytest.raises(ValueError, match="must be fp32 or bf16, not 'fp16'"):
        cases_of(BenchConfig(op="lora_linear", dtype="fp16"))
    assert len(cases_of(BenchConfig(op="lora_linear"))) == 16

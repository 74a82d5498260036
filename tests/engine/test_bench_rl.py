"""The benchmark of a step of PPO: the two compute the same, and it tells what it measured."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl import cli
from fuserl.batch import ShapedBatch
from fuserl.bench import rl_step
from fuserl.bench.output import WrongAnswer
from fuserl.bench.rl_step import PHASES, RLCase, RLStep, cases_of, make_prompts, run_case
from fuserl.config import BenchConfig


def tiny(dtype: str = "fp32") -> RLCase:
    return RLCase(
        model="tiny", dtype=dtype, device="cpu", num_prompts=3, max_new_tokens=6, num_epochs=1
    )


def test_prompts_are_ragged_and_sampled_in_groups() -> None:
    prompts = make_prompts(RLCase(model="3M", dtype="fp32", device="cpu"), 4096)
    assert prompts[::2] == prompts[1::2]
    lengths = [len(prompt.ids) for prompt in prompts]
    assert max(lengths) > 2 * min(lengths)


def test_a_hydra_holds_less_and_trains_alike() -> None:
    naive, hydra = RLStep(tiny(), "naive"), RLStep(tiny(), "hydra")
    assert hydra.state_bytes < naive.state_bytes
    for _ in range(2):
        ours, theirs = hydra.run(), naive.run()
        torch.testing.assert_close(ours.advantages, theirs.advantages, rtol=1e-3, atol=1e-4)
    for name, parameter in hydra.policy.named_parameters():
        torch.testing.assert_close(parameter, naive.policy.get_parameter(name), atol=1e-5, rtol=0)


def test_a_wrong_answer_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RLStep.answer

    def off(self: RLStep) -> ShapedBatch:
        batch = right(self)
        if batch.trunk_states is None:
            return batch
        return dataclasses.replace(batch, ref_logprobs=batch.ref_logprobs - 0.01)

    monkeypatch.setattr(RLStep, "answer", off)
    with pytest.raises(WrongAnswer, match=r"because hydra is 1.0e-02 from naive"):
        run_case(tiny(), 1, 1.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_command_writes_what_it_measured(
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(rl_step, "cases_of", lambda config: [tiny(config.dtype)])
    out = tmp_path / "a" / "step.json"
    flags = ["bench", "rl_step", "--dtype", dtype, "--rounds", "1", "--json", str(out)]
    assert cli.main(flags) == 0
    assert f"PPO step, tiny, half the layers frozen, {dtype} cpu" in capsys.readouterr().out
    (case,) = json.loads(out.read_text())["cases"]
    naive, hydra = case["results"]
    assert (naive["provider"], hydra["provider"]) == ("naive", "hydra")
    assert naive["kept_bytes"] == 0 < hydra["kept_bytes"]
    assert hydra["flops"] < naive["flops"]
    for result in (naive, hydra):
        assert all(len(result["seconds"][phase]) >= 3 for phase in PHASES)
        assert set(case["median_seconds"][result["provider"]]) == set(PHASES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 3}, "num_rows makes no sense with rl_step"),
        ({"model": "big"}, r"model of rl_step must be one of \('all', 'tiny', '3M', '25M'\)"),
        ({"dtype": "fp16"}, r"dtype of rl_step must be one of \('fp32', 'bf16'\)"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases_of(BenchConfig(op="rl_step", **options))

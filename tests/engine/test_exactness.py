"""The exact mode: what was sampled is what the trainer scores, to the bit, or it says that it is
off."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl import exactness
from fuserl.config import RLConfig
from fuserl.exactness import count_differing, make_exact
from fuserl.metrics import read_metrics
from fuserl.model.heads import LanguageModel
from fuserl.stages.rl import RLTrainer
from fuserl_kernels import native, use_backend

Rows = list[dict[str, Any]]
MakeModel = Callable[..., LanguageModel]

needs_native = pytest.mark.skipif(
    native.why_absent() is not None, reason="products in a fixed order need the compiled module"
)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_passes_and_the_mode_is_on(make_model: MakeModel, dtype: torch.dtype) -> None:
    model = make_model(seed=3).to(dtype)
    assert not model.trunk.exact
    assert make_exact(model, 0.7)
    assert model.trunk.exact


def test_a_trial_that_fails_turns_it_off_loudly(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch's own products differ between one row and many."""
    model = make_model(seed=3, hidden_size=64, intermediate_size=160, vocab_size=301)
    with use_backend("reference"), caplog.at_level(logging.WARNING):
        model.trunk.exact = True
        differing = count_differing(model, 1.0)
        assert not make_exact(model, 1.0)
    assert differing > 0
    assert not model.trunk.exact
    assert "exact mode is OFF" in caplog.text
    assert f"{differing} log-probabilities of a trial differ" in caplog.text


def test_models_that_cannot_are_named(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(seed=3)
    monkeypatch.setattr(exactness, "Decoder", torch.nn.Identity)  # as a module of transformers
    assert not make_exact(model, 1.0)
    assert "runs through transformers" in caplog.text


@needs_native
@pytest.mark.parametrize("max_positions", [2, 5, 24, 300])
def test_a_model_of_few_positions_is_tried_too(
    make_model: MakeModel, max_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    real = exactness.completion_logprobs

    def watched(model: LanguageModel, sequences: Any, temperature: float) -> torch.Tensor:
        tried.append(len(sequences.token_ids))
        return real(model, sequences, temperature)

    monkeypatch.setattr(exactness, "completion_logprobs", watched)
    assert make_exact(make_model(seed=3, max_positions=max_positions), 1.0)
    assert len(tried) == 3
    assert max(tried) >= 2


def test_a_model_without_room_is_named(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    assert not make_exact(make_model(seed=3, max_positions=1), 1.0)
    assert "no room for a prompt and a token" in caplog.text


def test_options_that_exclude_it() -> None:
    given: dict[str, Any] = {"model": "m", "data": "d", "out": "o", "exact": True}
    with pytest.raises(ValueError, match="exact makes no sense with lora_rank"):
        RLConfig(**given, lora_rank=4)
    with pytest.raises(ValueError, match='exact makes no sense with old_logprobs "recomputed"'):
        RLConfig(**given, old_logprobs="recomputed")


@needs_native
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_run_has_no_gap_and_ratios_of_exactly_one(
    policy_folder: Path, rows: Rows, tmp_path: Path, algorithm: Any
) -> None:
    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids) + ids[0] % 3) for ids in completion_ids]

    def run(exact: bool) -> list[dict[str, Any]]:
        out = tmp_path / f"exact_{exact}"
        RLTrainer(
            str(policy_folder),
            data=rows,
            reward=reward,
            algorithm=algorithm,
            preset="trl",
            out=str(out),
            steps=3,
            batch_size=6,
            num_samples=2,
            microbatch_size=5,
            max_new_tokens=12,
            learning_rate=1e-2,
            exact=exact,
        ).train()
        return list(read_metrics(out / "metrics.jsonl"))

    for line in run(exact=True):
        assert str(line["sampling/sampling_logp_difference/max"]) == "0.0"  # and no minus
        assert line["sampling/importance_sampling_ratio/min"] == 1.0
        assert line["sampling/importance_sampling_ratio/max"] == 1.0
        assert line["first/val/ratio"] == 1.0
        assert line["rollout/kv_bytes"] > 0
    plain = run(exact=False)
    assert max(line["sampling/sampling_logp_difference/max"] for line in plain) > 0.0, (
        "without the mode there is a gap that it closes"
    )

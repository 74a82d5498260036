"""What is logged of a step of RL: objective, time by phase, and the run's summary."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fuserl.batch import RolloutBatch, ShapedBatch
from fuserl.config import RLConfig
from fuserl.metrics import read_metrics
from fuserl.model.flops import Lengths, pass_of, step_flops, update_passes
from fuserl.model.heads import LanguageModel
from fuserl.stages.rl_models import RLModels


def describe(batch: ShapedBatch) -> dict[str, Tensor]:
    """What one shaped batch says, under the names users know; KL and entropy are summed over a
    sequence and averaged over sequences, in nats; without a reference there is no KL. Sequences
    left out enter no mean but that of the lengths."""
    included = batch.loss_mask.any(1)

    def mean(of_sequence: Tensor) -> Tensor:
        return torch.where(included, of_sequence, 0).sum() / included.sum().clamp(min=1)

    return {
        "objective/scores": mean(batch.applied_scores),
        "objective/raw_scores": mean(
            batch.scores if batch.scores.ndim == 1 else batch.scores.sum(1)
        ),
        **({} if batch.kl is None else {"objective/kl": mean(batch.kl.sum(1))}),
        "objective/entropy": mean(-batch.logprobs.sum(1)),
        "objective/rlhf_reward": mean(batch.rewards.sum(1)),
        "objective/completion_length": batch.completion_lengths.float().mean(),
        "objective/excluded": (~included).sum(),
        "val/num_eos_tokens": batch.has_eos.sum(),
    }


def hydra_savings(
    policy: LanguageModel, models: RLModels, batch: ShapedBatch, config: RLConfig
) -> dict[str, float]:
    """What starting from the kept stream spared this step; nothing for models that are none of a
    hydra. See model/flops.py for what is counted."""
    if batch.trunk_states is None:
        return {}
    recomputing = policy if batch.rollout_logprobs is not None else None
    scorers = [m for m in (models.reference, models.critic, recomputing) if m is not None]
    flops = step_flops(
        lengths_of(batch, config),
        scored=[pass_of(model) for model in scorers],
        updated=update_passes(policy, models.critic),
        num_epochs=config.passes,
    )
    return {
        "hydra/flops_saved_share": flops.saved_share,
        "hydra/flops": flops.hydra,
        "hydra/naive_flops": flops.naive,
        "hydra/trunk_state_bytes": batch.trunk_states.nbytes,
    }


def lengths_of(batch: RolloutBatch, config: RLConfig) -> Lengths:
    return Lengths(
        batch.prompt_lengths.tolist(), batch.completion_lengths.tolist(), config.num_samples
    )


PHASES = ("rollout", "score", "recompute", "shape", "update")
"""Of a step, in order; recompute is there only where old log-probabilities are recomputed."""


class Clock:
    """Seconds and tokens per second of each phase of a step. In a profiler's trace a phase is a
    range by the name of range_of."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.phase = ""
        """What runs, or was running when an error came up."""

    @contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        """Time what is inside; work it queued on a GPU counts too."""
        self.phase = phase
        began = time.perf_counter()
        with record_function(range_of(phase)):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.seconds[phase] = time.perf_counter() - began
        self.phase = ""

    def metrics(self, batch: RolloutBatch) -> dict[str, float | Tensor]:
        """Tokens are the completions': what the step is for."""
        num_tokens = int(batch.completion_lengths.sum())
        metrics: dict[str, float | Tensor] = {
            f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()
        }
        for phase, seconds in self.seconds.items():
            metrics[f"throughput/{phase}_tokens_per_second"] = num_tokens / seconds
        return metrics


def range_of(phase: str) -> str:
    return f"fuserl/{phase}"


def summarize(metrics_file: Path) -> dict[str, float]:
    """Means over the first and the last tenth of the steps."""
    lines = [line for line in read_metrics(metrics_file) if line["stage"] == "rl"]
    tenth = max(1, len(lines) // 10)

    def mean(name: str, part: Sequence[Mapping[str, Any]]) -> float:
        return sum(line[name] for line in part) / len(part)

    optional = {}
    if "objective/kl" in lines[0]:
        optional["kl"] = mean("objective/kl", lines[-tenth:])
    if "hydra/flops" in lines[0]:
        spent = mean("hydra/flops", lines) / mean("hydra/naive_flops", lines)
        optional["hydra/flops_saved_share"] = 1 - spent
    return {
        "scores_first": mean("objective/scores", lines[:tenth]),
        "scores_last": mean("objective/scores", lines[-tenth:]),
        "excluded": sum(line["objective/excluded"] for line in lines),
        "rollout_tokens_per_second": mean("throughput/rollout_tokens_per_second", lines),
        **optional,
    }

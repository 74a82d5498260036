"""What is logged of a step of RL: objective, time by phase, and the run's summary."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuserl.batch import RolloutBatch, ShapedBatch
from fuserl.config import RLConfig
from fuserl.metrics import read_metrics
from fuserl.model.decoder import Decoder
from fuserl.model.flops import Pass, StepFlops, step_flops
from fuserl.model.freezing import num_frozen
from fuserl.model.heads import Critic, LanguageModel


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
    policy: LanguageModel,
    reference: LanguageModel | None,
    critic: Critic | None,
    batch: ShapedBatch,
    config: RLConfig,
) -> dict[str, float]:
    """What starting from the kept stream spared this step; nothing for models that are none of a
    hydra. See model/flops.py for what is counted."""
    if batch.trunk_states is None:
        return {}

    def a_pass(trunk: Decoder) -> Pass:
        # All of a reference is frozen; where its own layers begin is where the policy's do.
        own = policy.trunk if reference is not None and trunk is reference.trunk else trunk
        return Pass(trunk.config, num_frozen(own), trunk.shared_layers > 0)

    lengths = (batch.prompt_lengths + batch.completion_lengths).tolist()
    completion_lengths = batch.completion_lengths.tolist()
    critics = [] if critic is None else [critic]
    recomputing = policy if batch.rollout_logprobs is not None else None
    scorers = [model for model in (reference, critic, recomputing) if model is not None]
    flops = step_flops(
        lengths,
        completion_lengths,
        scored=[a_pass(model.trunk) for model in scorers],
        updated=[
            a_pass(policy.trunk),
            *(a_pass(model.trunk) for model in critics if model.trunk is not policy.trunk),
        ],
        num_epochs=config.passes,
        head_trains=policy.output_weight.requires_grad,
    )
    # That counts the reference's vocabulary head in scoring, whether or not there is one.
    num_heads = sum(model is not None for model in (reference, recomputing))
    head = 2 * policy.config.hidden_size * policy.config.vocab_size * sum(completion_lengths)
    others = (num_heads - 1) * head
    flops = StepFlops(flops.naive + others, flops.hydra + others)
    return {
        "hydra/flops_saved_share": flops.saved_share,
        "hydra/flops": flops.hydra,
        "hydra/naive_flops": flops.naive,
        "hydra/trunk_state_bytes": batch.trunk_states.nbytes,
    }


class Clock:
    """Seconds and tokens per second of each phase of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def lap(self, phase: str) -> Iterator[None]:
        """Time what is inside; work it queued on a GPU counts too."""
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds[phase] = time.perf_counter() - began

    def metrics(self, batch: RolloutBatch) -> dict[str, float | Tensor]:
        """Tokens are the completions': what the step is for."""
        num_tokens = int(batch.completion_lengths.sum())
        metrics: dict[str, float | Tensor] = {
            f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()
        }
        for phase, seconds in self._seconds.items():
            metrics[f"throughput/{phase}_tokens_per_second"] = num_tokens / seconds
        return metrics


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

"""Who takes the training step: ours, and transformers' module in each of its precisions."""

import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fuserl.bench.case import DTYPES
from fuserl.bench.timing import Timed
from fuserl.bench.training_problem import Answer, StepProblem, convert, gradients_of, our_gradients
from fuserl.config import SFTConfig
from fuserl.optimizer import Optimizer
from fuserl.stages.sft import CompletionLoss

_CONFIG = SFTConfig(
    model="", data="", out="", learning_rate=1e-6, schedule="constant", warmup_share=0.0
)


class Step(Timed, Protocol):
    """A model with its optimizer, ready to train on one batch again and again."""

    def run(self) -> Tensor:
        """One step; returns the loss before it."""

    def answer(self) -> Answer:
        """Forward and backward alone."""

    @property
    def state_bytes(self) -> int:
        """Held between steps: weights, masters, moments."""


class FuserlStep:
    """The sft stage's step: packed rows, fused ops, fp32 masters under bf16 weights."""

    def __init__(self, problem: StepProblem) -> None:
        self._model = problem.our_model(DTYPES[problem.case.dtype])
        self._rows = range(len(problem.rows))
        self._objective = CompletionLoss(self._model, problem.rows)
        self._optimizer = Optimizer({"policy": self._model}, _CONFIG, total_steps=1)

    def prepare(self) -> None: ...

    def run(self) -> Tensor:
        loss = self._backward()
        self._optimizer.step()
        return loss

    def answer(self) -> Answer:
        loss = self._backward()
        return Answer(float(loss), our_gradients(self._model))

    def _backward(self) -> Tensor:
        loss, _ = self._objective.loss(self._rows)
        loss.backward()
        return loss.detach()

    @property
    def state_bytes(self) -> int:
        return _nbytes(self._model) + sum(t.nbytes for t in self._optimizer.state().values())


class TransformersStep:
    """LlamaForCausalLM with SDPA on the padded batch, its own loss, torch's fused AdamW."""

    def __init__(self, problem: StepProblem, dtype: torch.dtype, autocast: bool = False) -> None:
        self._model = convert(copy.deepcopy(problem.source), dtype)
        self._batch, self._autocast = problem.padded(), autocast
        self._device = problem.case.device
        self._adamw = torch.optim.AdamW(
            self._model.parameters(),
            lr=_CONFIG.learning_rate,
            eps=1e-5,
            weight_decay=0.0,
            fused=True,
        )

    def prepare(self) -> None: ...

    def run(self) -> Tensor:
        loss = self._backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), _CONFIG.max_grad_norm)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return loss

    def answer(self) -> Answer:
        loss = self._backward()
        return Answer(float(loss), gradients_of(self._model))

    def _backward(self) -> Tensor:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._autocast):
            loss = self._model(**self._batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    @property
    def state_bytes(self) -> int:
        moments = self._adamw.state.values()
        return _nbytes(self._model) + sum(t.nbytes for entry in moments for t in entry.values())


def _nbytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


OURS = "fuserl"
BASELINE = "transformers"

PROVIDERS: dict[str, dict[str, Callable[[StepProblem], Step]]] = {
    "fp32": {
        OURS: FuserlStep,
        BASELINE: lambda problem: TransformersStep(problem, torch.float32),
    },
    "bf16": {
        OURS: FuserlStep,
        BASELINE: lambda problem: TransformersStep(problem, torch.bfloat16),
        "transformers-autocast": lambda problem: TransformersStep(problem, torch.float32, True),
    },
}
"""By dtype. In bf16 theirs are bf16 weights and moments, or fp32 weights under autocast; ours has
bf16 weights with fp32 masters and moments."""

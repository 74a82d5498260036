"""AdamW with a schedule that is a function of the step, and gradients that must be finite."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fuserl.config import TrainConfig

MAX_SKIPPED = 5
"""Optimizer steps in a row that may be skipped for a NaN or infinite gradient."""


class NonFiniteError(FloatingPointError):
    """Gradients were NaN or infinite too many times in a row."""


def schedule_scale(schedule: str, warmup_share: float, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `total_steps`."""
    warmup_steps = round(warmup_share * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done))


class Optimizer:
    """One AdamW over named modules, each with its own peak learning rate and gradient norm."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        config: TrainConfig,
        *,
        total_steps: int,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        self._modules = dict(modules)
        self._config = config
        self._total_steps = total_steps
        self.steps = 0  # taken or skipped
        self._skipped = 0
        groups = []
        for name, module in modules.items():
            peak = (learning_rates or {}).get(name, config.learning_rate)
            parameters = list(module.parameters())
            for decay, members in (
                (config.weight_decay, [p for p in parameters if p.ndim > 1]),
                (0.0, [p for p in parameters if p.ndim <= 1]),
            ):
                groups.append({"params": members, "weight_decay": decay, "peak": peak})
        self._adamw = torch.optim.AdamW(groups, lr=config.learning_rate, eps=1e-5, fused=True)

    def step(self) -> dict[str, Tensor]:
        """Clip, update, and drop the gradients. Returns each module's gradient norm.

        A step with a NaN or infinite gradient changes no weight; MAX_SKIPPED of them in a row
        raise NonFiniteError.
        """
        scale = schedule_scale(
            self._config.schedule, self._config.warmup_share, self.steps, self._total_steps
        )
        for group in self._adamw.param_groups:
            group["lr"] = scale * group["peak"]
        norms = {
            f"grad_norm/{name}": nn.utils.clip_grad_norm_(
                module.parameters(), self._config.max_grad_norm or math.inf
            )
            for name, module in self._modules.items()
        }
        self.steps += 1
        if all(bool(norm.isfinite()) for norm in norms.values()):
            self._adamw.step()
            self._skipped = 0
        else:
            self._skipped += 1
            if self._skipped > MAX_SKIPPED:
                raise NonFiniteError(
                    f"the gradient was NaN or infinite {self._skipped} optimizer steps in a row "
                    "(weights unchanged by them); lower learning_rate or look at the data"
                )
        self._adamw.zero_grad(set_to_none=True)
        return norms

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name."""
        state = {}
        for name, parameter in self._named_parameters():
            for key, value in self._adamw.state[parameter].items():
                state[f"{name}.{key}"] = value
        return state

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        self.steps = steps
        for name, parameter in self._named_parameters():
            prefix = f"{name}."
            entries = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
            if entries:
                device = parameter.device
                self._adamw.state[parameter] = {k: v.to(device) for k, v in entries.items()}

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{module_name}.{name}", parameter)
            for module_name, module in self._modules.items()
            for name, parameter in module.named_parameters()
        ]

"""AdamW with a schedule that is a function of the step, and gradients that must be finite.

Weights narrower than fp32 are working copies: the optimizer holds an fp32 master of each beside
its moments, updates that, and writes the rounded copy back to where the weight lies. A bf16 weight
of 1 moves in steps of 0.004 to 0.008: without masters an update of 1e-5 would be lost.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fuserl.config import TrainConfig

MAX_SKIPPED = 5
"""Optimizer steps in a row that may be skipped for a NaN or infinite gradient."""

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MASTER = "master"


class NonFiniteError(FloatingPointError):
    """Gradients were NaN or infinite too many times in a row."""


class _Trained(NamedTuple):
    """A parameter that trains and what AdamW updates for it: the parameter itself in fp32 (and
    fp64), else its fp32 master."""

    name: str
    parameter: nn.Parameter
    master: nn.Parameter

    @property
    def is_copy(self) -> bool:
        return self.master is not self.parameter


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
    """One AdamW over named modules, each with its own peak learning rate and gradient norm.

    Parameters that do not require a gradient are left alone and cost nothing. Gradients of
    weights narrower than fp32 are fp32 from here on (their grad_dtype says so): what one backward
    pass rounds is added to what earlier ones left without rounding again.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        config: TrainConfig,
        *,
        total_steps: int,
        learning_rates: Mapping[str, float] | None = None,
    ) -> None:
        self._config = config
        self._total_steps = total_steps
        self.steps = 0  # taken or skipped
        self._skipped = 0
        self._trained = {name: _trained_of(name, module) for name, module in modules.items()}
        groups = []
        for name, trained in self._trained.items():
            peak = (learning_rates or {}).get(name, config.learning_rate)
            masters = [entry.master for entry in trained]
            for decay, members in (
                (config.weight_decay, [p for p in masters if p.ndim > 1]),
                (0.0, [p for p in masters if p.ndim <= 1]),
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
        copies = [entry for entry in self._entries() if entry.is_copy]
        for entry in copies:
            entry.master.grad, entry.parameter.grad = entry.parameter.grad, None
        norms = {
            f"grad_norm/{name}": nn.utils.clip_grad_norm_(
                [entry.master for entry in trained], self._config.max_grad_norm or math.inf
            )
            for name, trained in self._trained.items()
        }
        self.steps += 1
        if all(bool(norm.isfinite()) for norm in norms.values()):
            self._adamw.step()
            _write(copies)
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

    def undo_since(self, steps: int) -> bool:
        """Drop the gradients of backward passes since so many steps were taken; False where one
        was taken since, which nothing undoes."""
        if self.steps != steps:
            return False
        for entry in self._entries():
            entry.parameter.grad = entry.master.grad = None
        return True

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and masters by parameter name."""
        state = {}
        for entry in self._entries():
            for key, value in self._adamw.state[entry.master].items():
                state[f"{entry.name}.{key}"] = value
            if entry.is_copy:
                state[f"{entry.name}.{_MASTER}"] = entry.master.detach()
        return state

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from what `state` returned after `steps` steps; sets the weights that have
        masters too."""
        self.steps = steps
        for entry in self._entries():
            device = entry.parameter.device
            moments = {
                key: state[name].to(device)
                for key in _MOMENTS
                if (name := f"{entry.name}.{key}") in state
            }
            if moments:
                self._adamw.state[entry.master] = moments
            if entry.is_copy:
                entry.master.detach().copy_(state[f"{entry.name}.{_MASTER}"])
        _write([entry for entry in self._entries() if entry.is_copy])

    def _entries(self) -> list[_Trained]:
        return [entry for trained in self._trained.values() for entry in trained]


def _trained_of(module_name: str, module: nn.Module) -> list[_Trained]:
    """What trains of a module, with a fresh master for each weight that needs one."""
    trained = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        master = parameter
        if parameter.dtype.itemsize < torch.float32.itemsize:
            master = nn.Parameter(parameter.detach().float())
            parameter.grad_dtype = torch.float32
        trained.append(_Trained(f"{module_name}.{name}", parameter, master))
    return trained


@torch.no_grad()
def _write(copies: list[_Trained]) -> None:
    """Round masters into the weights, in place: whoever reads the weights keeps their address."""
    if copies:
        torch._foreach_copy_(
            [entry.parameter for entry in copies], [entry.master for entry in copies]
        )

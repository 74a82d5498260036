"""Learning rates by step, gradients that must be finite, and moments that survive."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuserl.config import TrainConfig
from fuserl.optimizer import MAX_SKIPPED, NonFiniteError, Optimizer, schedule_scale


def config(**options: Any) -> TrainConfig:
    defaults = {"model": "m", "data": "d", "out": "o", "schedule": "constant", "warmup_share": 0.0}
    return TrainConfig(**{**defaults, "learning_rate": 0.1, **options})


def layer(seed: int = 0) -> nn.Linear:
    made = nn.Linear(3, 2)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in made.parameters():
            parameter.normal_(generator=generator)
    return made


def give(module: nn.Module, value: float) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)


def weights(*modules: nn.Module) -> list[Tensor]:
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_schedules() -> None:
    def values(schedule: str, warmup_share: float = 0.0) -> list[float]:
        return [schedule_scale(schedule, warmup_share, step, 10) for step in range(10)]

    assert values("constant") == [1.0] * 10
    assert values("linear") == pytest.approx([1 - step / 10 for step in range(10)])
    cosine = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert values("cosine") == pytest.approx(cosine)
    warmed = values("linear", 0.4)
    assert warmed == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert values("constant", 0.4)[4:] == [1.0] * 6
    assert schedule_scale("cosine", 0.03, 0, 1) == 1.0, "a run of one step learns"


def test_the_schedule_reaches_the_weights() -> None:
    """Adam's first moves are of the size of the learning rate: each module has its own."""
    policy, critic = layer(), layer(1)
    modules = {"policy": policy, "critic": critic}
    optimizer = Optimizer(
        modules, config(schedule="linear"), total_steps=2, learning_rates={"critic": 0.01}
    )
    for scale in (1.0, 0.5):
        before = weights(policy), weights(critic)
        give(policy, 0.1)
        give(critic, 0.1)
        optimizer.step()
        for module, old, peak in ((policy, before[0], 0.1), (critic, before[1], 0.01)):
            for tensor, start in zip(weights(module), old, strict=True):
                moved = torch.full_like(tensor, peak * scale)
                torch.testing.assert_close(start - tensor, moved, rtol=1e-3, atol=0)


def test_only_matrices_decay() -> None:
    module = layer()
    matrix, bias = weights(module)
    optimizer = Optimizer({"m": module}, config(weight_decay=0.5), total_steps=1)
    give(module, 0.0)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), matrix * (1 - 0.1 * 0.5))
    assert torch.equal(module.bias, bias)


def test_each_module_is_clipped_by_its_own_norm() -> None:
    loud, quiet = layer(), layer(1)
    optimizer = Optimizer({"loud": loud, "quiet": quiet}, config(max_grad_norm=1.0), total_steps=9)
    seen: dict[str, float] = {}

    def look(*_: Any) -> None:
        for name, module in (("loud", loud), ("quiet", quiet)):
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            seen[name] = torch.cat([grad.flatten() for grad in grads]).norm().item()

    optimizer._adamw.register_step_pre_hook(look)
    give(loud, 100.0)
    give(quiet, 0.01)
    norms = optimizer.step()
    assert norms["grad_norm/loud"].item() == pytest.approx(100 * 8**0.5)
    assert norms["grad_norm/quiet"].item() == pytest.approx(0.01 * 8**0.5)
    assert seen["loud"] == pytest.approx(1.0, rel=1e-4)
    assert seen["quiet"] == pytest.approx(0.01 * 8**0.5)
    assert all(p.grad is None for p in (*loud.parameters(), *quiet.parameters()))


def test_no_maximum_norm_leaves_the_gradient_alone() -> None:
    module = layer()
    optimizer = Optimizer({"m": module}, config(max_grad_norm=0.0), total_steps=9)
    seen: list[float] = []

    def look(*_: Any) -> None:
        seen.extend(float(p.grad.max()) for p in module.parameters() if p.grad is not None)

    optimizer._adamw.register_step_pre_hook(look)
    give(module, 100.0)
    optimizer.step()
    assert seen == pytest.approx([100.0, 100.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_no_weight(bad: float) -> None:
    policy, critic = layer(), layer(1)
    optimizer = Optimizer({"policy": policy, "critic": critic}, config(), total_steps=100)
    give(policy, 1.0)
    give(critic, 1.0)
    optimizer.step()
    before, moments = weights(policy, critic), {k: v.clone() for k, v in optimizer.state().items()}
    for _ in range(MAX_SKIPPED):
        give(policy, 1.0)
        give(critic, 1.0)
        assert critic.bias.grad is not None
        critic.bias.grad[0] = bad
        optimizer.step()
    assert same(weights(policy, critic), before)
    after = optimizer.state()
    assert moments.keys() == after.keys()
    assert all(torch.equal(moments[name], after[name]) for name in moments)
    assert optimizer.steps == 1 + MAX_SKIPPED

    give(policy, bad)
    give(critic, 1.0)
    with pytest.raises(NonFiniteError, match=rf"{MAX_SKIPPED + 1} optimizer steps in a row.*learn"):
        optimizer.step()
    assert same(weights(policy, critic), before)


def test_a_good_step_forgives_the_bad_ones() -> None:
    module = layer()
    optimizer = Optimizer({"m": module}, config(), total_steps=100)
    for _ in range(2):
        for _ in range(MAX_SKIPPED):
            give(module, math.nan)
            optimizer.step()
        before = weights(module)
        give(module, 1.0)
        optimizer.step()
        assert not same(weights(module), before)


def test_moments_survive() -> None:
    """Saved after two steps and loaded by another optimizer, the third step is the same."""
    first = layer()
    optimizer = Optimizer({"m": first}, config(schedule="linear"), total_steps=5)
    for value in (1.0, -0.5):
        give(first, value)
        optimizer.step()
    second = layer()
    second.load_state_dict(first.state_dict())
    resumed = Optimizer({"m": second}, config(schedule="linear"), total_steps=5)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert set(state) == {
        f"m.{name}.{key}"
        for name in ("weight", "bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    resumed.load_state(state, steps=2)
    for module, own in ((first, optimizer), (second, resumed)):
        give(module, 0.3)
        own.step()
    assert same(weights(first), weights(second))

"""Learning rates by step, gradients that must be finite, moments that survive, and fp32 masters
of narrower weights."""

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


def give_wide(module: nn.Module, value: float) -> None:
    """fp32 gradients, as the optimizer asks of bf16 weights."""
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value, dtype=torch.float32)


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


def test_updates_too_small_for_bf16_add_up() -> None:
    """A weight of 1 moves by no less than 2^-8 in bf16; fifty steps of 2^-10 must move it."""
    module = nn.Linear(3, 2).bfloat16()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0)
    places = [parameter.data_ptr() for parameter in module.parameters()]
    optimizer = Optimizer({"m": module}, config(learning_rate=2.0**-10), total_steps=100)
    give_wide(module, 1.0)
    optimizer.step()
    assert all(bool((p == 1).all()) for p in module.parameters()), "rounded back to where it was"
    for _ in range(49):
        give_wide(module, 1.0)
        optimizer.step()
    for parameter in module.parameters():
        torch.testing.assert_close(
            parameter.float(), torch.full(parameter.shape, 1 - 50 * 2.0**-10), rtol=2**-8, atol=0
        )
    assert [parameter.data_ptr() for parameter in module.parameters()] == places
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


def test_bf16_weights_are_the_rounded_weights_of_an_fp32_run() -> None:
    """Equal gradients move the masters as they move fp32 weights, bit for bit."""
    wide, copies = layer(), layer().bfloat16()
    with torch.no_grad():
        for ours, theirs in zip(copies.parameters(), wide.parameters(), strict=True):
            theirs.copy_(ours)
    options = {"weight_decay": 0.1, "schedule": "linear"}
    optimizers = [
        Optimizer({"m": module}, config(**options), total_steps=4) for module in (wide, copies)
    ]
    for value in (1.0, -0.25, 3.0, 0.001):
        give(wide, value)
        give_wide(copies, value)
        first, second = (optimizer.step() for optimizer in optimizers)
        assert torch.equal(first["grad_norm/m"], second["grad_norm/m"])
    assert same([tensor.bfloat16() for tensor in weights(wide)], weights(copies))


def test_gradients_of_bf16_weights_add_up_in_fp32() -> None:
    """A thousand microbatches of 1/256 each: a bf16 sum stops growing at 1."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    Optimizer({"m": module}, config(), total_steps=1)
    for _ in range(1000):
        module(torch.full((1, 1), 2.0**-8, dtype=torch.bfloat16)).sum().backward()
    grad = module.weight.grad
    assert grad is not None
    assert grad.dtype == torch.float32
    assert grad.item() == 1000 * 2.0**-8


def test_masters_survive() -> None:
    """What the weights lost by rounding is in the state: a resumed run goes on with equal bits."""
    first = layer().bfloat16()
    optimizer = Optimizer({"m": first}, config(learning_rate=1e-3), total_steps=9)
    for value in (1.0, -0.5):
        give_wide(first, value)
        optimizer.step()
    second = layer(1).bfloat16()
    resumed = Optimizer({"m": second}, config(learning_rate=1e-3), total_steps=9)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    assert state["m.weight.master"].dtype == torch.float32
    resumed.load_state(state, steps=2)
    assert same(weights(first), weights(second)), "the weights are the rounded masters"
    for _ in range(5):
        for module, own in ((first, optimizer), (second, resumed)):
            give_wide(module, 0.3)
            own.step()
    assert same(weights(first), weights(second))
    ours, theirs = optimizer.state(), resumed.state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_bad_gradient_changes_no_master() -> None:
    module = layer().bfloat16()
    optimizer = Optimizer({"m": module}, config(), total_steps=9)
    give_wide(module, 1.0)
    optimizer.step()
    before, state = weights(module), {k: v.clone() for k, v in optimizer.state().items()}
    give_wide(module, math.nan)
    optimizer.step()
    assert same(weights(module), before)
    assert all(torch.equal(state[name], tensor) for name, tensor in optimizer.state().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_parameters_cost_nothing(dtype: torch.dtype) -> None:
    module = layer().to(dtype)
    module.weight.requires_grad_(False)
    optimizer = Optimizer({"m": module}, config(weight_decay=0.5), total_steps=9)
    before = module.weight.clone()
    module(torch.ones(1, 3, dtype=dtype)).sum().backward()
    optimizer.step()
    assert torch.equal(module.weight, before)
    assert {name.split(".")[1] for name in optimizer.state()} == {"bias"}

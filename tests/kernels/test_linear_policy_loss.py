"""linear_policy_loss equals linear_token_logprobs followed by policy_loss."""

import itertools

import pytest
import torch
from kernel_testing import opcheck, ragged_mask, runnable

import fuserl_kernels as fk
from fuserl_kernels.linear_policy_loss import FORWARD
from fuserl_kernels.projection import Projection
from fuserl_kernels.reference.policy import LOG_RATIO

BACKENDS = runnable(FORWARD)


def batch(dtype=torch.float32, num_sequences=4, num_slots=5, dim=6, vocab_size=20):
    shape = (num_sequences, num_slots)
    hidden = torch.randn(*shape, dim).to(dtype).requires_grad_()
    weight = (0.7 * torch.randn(vocab_size, dim)).to(dtype).requires_grad_()
    bias = torch.randn(vocab_size).to(dtype).requires_grad_()
    token_ids = torch.randint(0, vocab_size, shape)
    old = fk.linear_token_logprobs(hidden, weight, token_ids, bias=bias).detach()
    old = old + 0.3 * torch.randn_like(old)
    ref = old + 0.3 * torch.randn_like(old)
    return (hidden, weight, bias), token_ids, old, torch.randn_like(old), ref


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_per_chunk", [3, 1000])
@pytest.mark.parametrize(
    ("level", "clip", "aggregation"),
    [
        *itertools.product(["token"], ["ppo", "cispo"], ["token_mean", "sequence_mean"]),
        ("sequence_sum", "none", "sequence_sum"),
        ("sequence_mean", "ppo", "sequence_mean"),
    ],
)
def test_equals_its_parts(backend, rows_per_chunk, level, clip, aggregation, monkeypatch):
    leaves, token_ids, old, advantages, ref = batch()
    monkeypatch.setattr("fuserl_kernels.projection.chunk_rows", lambda *_: rows_per_chunk)
    mask = ragged_mask(4, 5, holes=True)
    token_ids = torch.where(mask, token_ids, -1)
    options = {
        "ratio_level": level,
        "clip": clip,
        "aggregation": aggregation,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "ref_logprobs": ref,
        "denominator": 3.5,
    }
    head = {"bias": leaves[2], "softcap": 6.0, "temperature": torch.rand(4, 5) + 0.5}
    logprobs, entropy = fk.linear_token_logprobs(
        *leaves[:2], token_ids, loss_mask=mask, return_entropy=True, **head
    )
    expected, expected_metrics = fk.policy_loss(
        logprobs, old, advantages, mask, entropy=entropy, **options
    )
    with fk.use_backend(backend):
        loss, metrics = fk.linear_policy_loss(
            *leaves[:2], token_ids, old, advantages, mask, **head, **options
        )
    # A sum of log-ratios multiplies what the products differ by.
    loose = 5.0 if level == "sequence_sum" else 1.0
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    assert metrics.keys() - expected_metrics.keys() == set(LOG_RATIO)
    shared = {name: metrics[name] for name in expected_metrics}
    torch.testing.assert_close(shared, expected_metrics, atol=1e-5, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(3 * loss, leaves),
        torch.autograd.grad(3 * expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=loose * 3e-6, rtol=loose * 1e-5)


VARIANTS = {
    "sapo": {"clip": "sapo"},
    "vespo": {"clip": "vespo", "ratio_level": "sequence_sum"},
    "gspo with token gradients": {"ratio_level": "sequence_mean_token"},
    "bounds": {"log_ratio_clip": 0.2, "kl_clip": 0.05, "kl_coef": 0.2, "dual_clip": 3.0},
    "truncated": {"correction": "truncate", "correction_range": (0.0, 1.1)},
    "masked": {"correction": "mask", "correction_level": "sequence_mean"},
    "one advantage a sequence": {"correction": "reject", "aggregation": "sequence_sum"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_equal_policy_loss(backend, name):
    (hidden, weight, _), token_ids, old, advantages, ref = batch()
    mask, options = ragged_mask(4, 5, holes=True), dict(VARIANTS[name])
    options |= {"ref_logprobs": ref, "entropy_coef": 0.01}
    if "correction" in options:
        options["rollout_logprobs"] = old + 0.2 * torch.randn_like(old)
        options.setdefault("correction_range", (0.85, 1.15))
    if name == "one advantage a sequence":
        advantages = advantages[:, 0]
    logprobs, entropy = fk.linear_token_logprobs(hidden, weight, token_ids, return_entropy=True)
    expected, expected_metrics = fk.policy_loss(
        logprobs, old, advantages, mask, entropy=entropy, **options
    )
    with fk.use_backend(backend):
        loss, metrics = fk.linear_policy_loss(
            hidden, weight, token_ids, old, advantages, mask, **options
        )
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    assert metrics.keys() - expected_metrics.keys() == set(LOG_RATIO)
    shared = {name: metrics[name] for name in expected_metrics}
    torch.testing.assert_close(shared, expected_metrics, atol=1e-5, rtol=1e-5)
    leaves = (hidden, weight)
    for got, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=3e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_range_of_the_log_ratios(backend, grad):
    """Of the trained tokens alone: whatever an old log-probability is elsewhere, it is not read."""
    (hidden, weight, _), token_ids, _, advantages, _ = batch()
    mask = ragged_mask(4, 5, holes=True)
    new = fk.linear_token_logprobs(hidden, weight, token_ids).detach()
    gap = torch.rand(4, 5) - 0.8  # both signs, and the greatest distance is below
    old = torch.where(mask, new - gap, torch.nan)
    with fk.use_backend(backend), torch.set_grad_enabled(grad):
        _, metrics = fk.linear_policy_loss(hidden, weight, token_ids, old, advantages, mask)
        _, one_sided = fk.linear_policy_loss(
            hidden, weight, token_ids, new - gap.abs() - 0.1, advantages, mask
        )
        _, nothing = fk.linear_policy_loss(
            hidden, weight, token_ids, old, advantages, torch.zeros_like(mask)
        )
    want = gap[mask]
    assert want.min() < -0.5 < 0.05 < want.max()
    for name, value in zip(LOG_RATIO, (want.abs().mean(), want.min(), want.max()), strict=True):
        torch.testing.assert_close(metrics[name], value, atol=2e-6, rtol=0.0, msg=name)
        assert nothing[name].item() == 0
    least = want.abs().min() + 0.1  # masked slots do not count as 0
    torch.testing.assert_close(one_sided["log_ratio/min"], least, atol=2e-6, rtol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows(backend):
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    mask = torch.ones(4, 5, dtype=torch.bool)
    options = {"ratio_level": "sequence_mean", "aggregation": "sequence_mean"}
    with fk.use_backend(backend):
        expected, _ = fk.linear_policy_loss(
            hidden, weight, token_ids, old, advantages, mask, **options
        )
        loss, _ = fk.linear_policy_loss(
            hidden.flatten(0, 1),
            weight,
            token_ids.flatten(),
            old.flatten(),
            advantages.flatten(),
            mask.flatten(),
            cu_seqlens=torch.arange(0, 21, 5),
            **options,
        )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_keeps_float32_statistics(backend):
    leaves, token_ids, old, advantages, _ = batch(torch.bfloat16, dim=32, vocab_size=500)
    mask = torch.ones_like(old, dtype=torch.bool)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth, _ = fk.linear_policy_loss(
        *wide[:2], token_ids, old.double(), advantages.double(), mask, bias=wide[2]
    )
    with fk.use_backend(backend):
        loss, _ = fk.linear_policy_loss(
            *leaves[:2], token_ids, old, advantages, mask, bias=leaves[2]
        )
    assert loss.item() == pytest.approx(truth.item(), abs=1e-5)
    for got, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(
            got.double(), want, atol=4e-3 * float(want.abs().max()), rtol=0.01
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence_mean"])
def test_all_masked_and_partial_gradients(backend, level):
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    nothing = torch.zeros_like(old, dtype=torch.bool)
    with fk.use_backend(backend):
        loss, _ = fk.linear_policy_loss(
            hidden * torch.nan, weight, token_ids, old, advantages, nothing, ratio_level=level
        )
        loss.backward()
        assert loss.item() == 0
        assert (hidden.grad == 0).sum() + hidden.grad.isnan().sum() == hidden.numel()
        assert (weight.grad == 0).all()
        frozen, _ = fk.linear_policy_loss(
            hidden, weight.detach(), token_ids, old, advantages, ~nothing, ratio_level=level
        )
        frozen.backward()
        with torch.no_grad():
            plain, _ = fk.linear_policy_loss(
                hidden, weight, token_ids, old, advantages, ~nothing, ratio_level=level
            )
    assert not plain.requires_grad
    torch.testing.assert_close(plain, frozen.detach())


@pytest.fixture
def logits_computed(monkeypatch):
    """Rows of logits computed so far, as a list of chunk sizes."""
    chunks: list[int] = []
    compute = Projection.logits

    def counted(self, rows):
        chunks.append(rows.stop - rows.start)
        return compute(self, rows)

    monkeypatch.setattr(Projection, "logits", counted)
    return chunks


@pytest.mark.parametrize(
    ("level", "rows_per_chunk", "expected"),
    [
        ("token", 4, [4, 4, 3]),
        ("sequence_mean", 7, [6, 5]),  # 4 + 2, then 5: chunks end where sequences end
        ("sequence_mean", 20, [11]),
        ("sequence_sum", 3, [3, 1, 3, 1, 2, 3, 2, 3, 2]),  # longer than a chunk: twice
    ],
)
def test_logits_are_computed_once(level, rows_per_chunk, expected, logits_computed, monkeypatch):
    monkeypatch.setattr("fuserl_kernels.projection.chunk_rows", lambda *_: rows_per_chunk)
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    lengths = torch.tensor([4, 2, 0, 5])
    mask = torch.arange(5) < lengths[:, None]
    logits_computed.clear()
    fk.linear_policy_loss(hidden, weight, token_ids, old, advantages, mask, ratio_level=level)
    assert logits_computed == expected
    logits_computed.clear()
    with torch.no_grad():
        fk.linear_policy_loss(hidden, weight, token_ids, old, advantages, mask, ratio_level=level)
    assert sum(logits_computed) == 11


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_ratio_is_one(backend, dtype):
    """Old logprobs from linear_token_logprobs: the first update sees ratio 1 to the bit, on a CPU,
    where both take the same products."""
    (hidden, weight, bias), token_ids, _, advantages, _ = batch(dtype, 6, 40, 16, 300)
    mask = ragged_mask(6, 40)
    with fk.use_backend(backend):
        old = fk.linear_token_logprobs(hidden, weight, token_ids, bias=bias, loss_mask=mask)
        _, metrics = fk.linear_policy_loss(
            hidden, weight, token_ids, old.detach(), advantages, mask, bias=bias
        )
    if backend == "triton":  # the path without gradient is another product
        assert abs(metrics["val/ratio"].item() - 1) < 1e-5
    else:
        assert metrics["val/ratio"].item() == 1
        assert metrics["policy/approxkl"].item() == 0
        assert metrics["val/ratio_var"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_grad_accumulates_in_float32(backend, dtype):
    (hidden, weight, bias), token_ids, old, advantages, _ = batch(dtype, dim=16)
    mask = ragged_mask(4, 5)
    arguments = (token_ids, old, advantages, mask)
    total = torch.ones(20, 16)
    with fk.use_backend(backend):
        weight.grad_dtype = torch.float32
        loss, metrics = fk.linear_policy_loss(hidden, weight, *arguments, bias=bias)
        expected = torch.autograd.grad(loss, (hidden, weight, bias))
        assert expected[1].dtype == torch.float32
        for _ in range(2):  # two microbatches share one sum
            loss_too, metrics_too = fk.linear_policy_loss(
                hidden, weight, *arguments, bias=bias, weight_grad=total
            )
            grad_hidden, grad_bias = torch.autograd.grad(loss_too, (hidden, bias))
        with torch.no_grad():
            fk.linear_policy_loss(hidden, weight, *arguments, weight_grad=total)
    assert torch.equal(loss_too, loss)
    assert all(torch.equal(metrics_too[name], metrics[name]) for name in metrics)
    torch.testing.assert_close(grad_hidden, expected[0])
    torch.testing.assert_close(grad_bias, expected[2])
    torch.testing.assert_close((total - 1) / 2, expected[1], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_grad_of_a_head_that_trains_alone(backend):
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    arguments = (token_ids, old, advantages, ragged_mask(4, 5))
    total = torch.zeros(20, 6)
    with fk.use_backend(backend):
        loss, _ = fk.linear_policy_loss(hidden.detach(), weight, *arguments)
        (expected,) = torch.autograd.grad(loss, weight)
        fk.linear_policy_loss(hidden.detach(), weight, *arguments, weight_grad=total)
    torch.testing.assert_close(total, expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_inside(backend):
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    arguments = (token_ids, old, advantages, ragged_mask(4, 5))
    results = []
    for enabled in (False, True):
        with fk.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = fk.linear_policy_loss(hidden, weight, *arguments)
            results.append(torch.autograd.grad(loss, (hidden, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_not_differentiable_twice():
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    loss, _ = fk.linear_policy_loss(
        hidden, weight, token_ids, old, advantages, torch.ones(4, 5, dtype=torch.bool)
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_weight_grad_refuses_a_scaled_loss():
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    mask, total = torch.ones(4, 5, dtype=torch.bool), torch.zeros(20, 6)
    loss, _ = fk.linear_policy_loss(
        hidden, weight, token_ids, old, advantages, mask, weight_grad=total
    )
    with pytest.raises(RuntimeError, match="scale it by denominator"):
        (0.5 * loss).backward()
    for bad, message in [
        (total[:1], "weight_grad must have shape"),
        (total.double(), "weight_grad must be torch.float32"),
        (total.t().contiguous().t(), "weight_grad must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            fk.linear_policy_loss(hidden, weight, token_ids, old, advantages, mask, weight_grad=bad)


def test_gradients_are_handed_out_once():
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    mask = torch.ones(4, 5, dtype=torch.bool)
    loss, _ = fk.linear_policy_loss(hidden, weight, token_ids, old, advantages, mask)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands out its gradients once"):
        loss.backward()


def test_accumulation_compiles_whole():
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    mask = torch.ones(4, 5, dtype=torch.bool)

    def run(function):
        total = torch.zeros(20, 6)
        loss = function(hidden, weight, total)
        return loss, torch.autograd.grad(loss, hidden)[0], total

    def loss_of(hidden, weight, total):
        return fk.linear_policy_loss(
            hidden, weight, token_ids, old, advantages, mask, weight_grad=total
        )[0]

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(loss_of), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence_sum"])
def test_opcheck(backend, level):
    leaves, token_ids, old, advantages, ref = batch(num_sequences=2, num_slots=2)
    mask = torch.ones_like(old, dtype=torch.bool)
    hidden = leaves[0].detach().flatten(0, 1).requires_grad_()
    with fk.use_backend(backend):
        opcheck(
            "linear_policy_loss",
            hidden,
            *leaves[1:],
            token_ids.flatten(),
            old,
            advantages,
            mask,
            None,
            0.8,
            0.0,
            None,
            None,
            ref,
            level,
            "ppo",
            0.2,
            0.2,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            5.0,
            "token_mean",
            0.1,
            "k3",
            4.0,
            0.01,
            True,
            True,
            True,
            False,
        )


def test_sequence_ends_are_checked_before_they_are_followed():
    hidden, weight = torch.zeros(5, 4), torch.zeros(7, 4)
    ids, x = torch.zeros(5, dtype=torch.long), torch.zeros(5)
    with pytest.raises(ValueError, match="cu_seqlens must run from 0 to 5"):
        fk.linear_policy_loss(
            hidden, weight, ids, x, torch.ones(1), x == 0, cu_seqlens=torch.tensor([0, 3])
        )


def test_bad_arguments_are_named():
    x, hidden, weight = torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(5, 4)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="logprobs must have shape"):
        fk.linear_policy_loss(hidden, weight, ids, x[:1], x, x == 0)
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 5\)"):
        fk.linear_policy_loss(hidden, weight, ids + 5, x, x, x == 0)
    with pytest.raises(ValueError, match="ref_logprobs is needed"):
        fk.linear_policy_loss(hidden, weight, ids, x, x, x == 0, kl_coef=0.1)

"""The native KL, shaping, GAE and whitening: every instruction set against the definition in
float64, threads and neighbours, holes that meet a vector's ends, half precision, strides."""

import pytest
import torch
from kernel_testing import assert_error_rule, ragged_mask

from fuserl_kernels import native, native_advantages
from fuserl_kernels.reference import rewards as reference

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)

ESTIMATORS = ["k1", "k2", "k3", "abs"]
WIDTHS = [1, 3, 4, 5, 8, 15, 16, 17, 31, 33, 100]


def wide(arguments):
    """The same arguments in float64."""
    floating = (torch.float32, torch.bfloat16, torch.float16)
    return [
        x.double() if isinstance(x, torch.Tensor) and x.dtype in floating else x for x in arguments
    ]


def check(name, arguments, tolerance=2e-6):
    """Against the definition in float64, where PyTorch's own float32 may err as it does."""
    got = getattr(native_advantages, name)(*arguments)
    peer = getattr(reference, name)(*arguments)
    truth = getattr(reference, name)(*wide(arguments))
    if isinstance(got, torch.Tensor):
        got, peer, truth = (got,), (peer,), (truth,)
    for a, b, c in zip(got, peer, truth, strict=True):
        assert a.dtype == b.dtype
        size = float(c.abs().max().clamp(min=1.0)) if c.numel() else 1.0
        assert_error_rule(a, b, c, tolerance * size)
    return got


def sequences(num_slots, num_sequences=9):
    """Dirty rewards and values, a loss mask with holes and the value mask one slot longer."""
    loss_mask = ragged_mask(num_sequences, num_slots, holes=True)
    loss_mask[2] = True
    loss_mask[3] = torch.arange(num_slots) % 16 != 15  # a hole at the end of each vector
    loss_mask[4] = torch.arange(num_slots) % 16 != 0  # and at its beginning
    loss_mask[5] = (torch.arange(num_slots) < 2) | (torch.arange(num_slots) > 70)
    value_mask = loss_mask | torch.nn.functional.pad(loss_mask, (1, 0))[:, :-1]
    rewards, values = torch.randn(2, num_sequences, num_slots)
    rewards, values = (torch.where(value_mask, x, torch.nan) for x in (rewards, values))
    return rewards, values, loss_mask, value_mask


def shaping(num_slots, slot="after", **changes):
    scores = torch.randn(9) * 2
    _, _, mask, _ = sequences(num_slots)
    logprobs, ref_logprobs = torch.randn(2, 9, num_slots)
    logprobs, ref_logprobs = (torch.where(mask, x, torch.nan) for x in (logprobs, ref_logprobs))
    scores[~mask.any(1)] = torch.nan
    options = {
        "has_eos": torch.rand(9) > 0.5,
        "kl_coefs": torch.tensor(0.3),
        "kl_coef": 0.0,
        "estimator": "k3",
        "kl_clip": 1.5,
        "score_slot": slot,
        "score_clip": 1.0,
        "score_scale": 0.7,
        "missing_eos": "subtract",
        "missing_eos_penalty": 0.4,
        "max_length": 0,
    } | changes
    return scores, logprobs, ref_logprobs, mask, *options.values()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kl_clip", [0.0, 0.8])
def test_kl(instructions, estimator, kl_clip):
    for size in (0, 1, 17, 5000):
        x, y, grad = torch.randn(3, size) * 2
        check("kl_penalty_fwd", (x, y, estimator, kl_clip))
        check("kl_penalty_bwd", (x, y, estimator, kl_clip, grad))


def test_the_third_estimate_keeps_its_digits(instructions):
    """d^2 / 2 - d^3 / 6 + ..., of which expm1(-d) + d loses the first ones."""
    d = torch.logspace(-7, 1.9, 4000).mul(torch.tensor([1.0, -1.0]).repeat(2000))
    got = native_advantages.kl_penalty_fwd(d, torch.zeros_like(d), "k3", 0.0)
    wide_d = d.double()
    series = wide_d**2 * (0.5 - wide_d * (1 / 6 - wide_d * (1 / 24 - wide_d / 120)))
    truth = torch.where(wide_d.abs() < 1e-2, series, torch.expm1(-wide_d) + wide_d)
    torch.testing.assert_close(got.double(), truth, atol=0.0, rtol=2e-6)


def test_kl_of_infinities(instructions):
    logprobs = torch.tensor([-torch.inf, 0.0, torch.nan])
    ref_logprobs = torch.tensor([0.0, -torch.inf, 0.0])
    for estimator in ESTIMATORS:
        arguments = logprobs, ref_logprobs, estimator, 0.0
        got = native_advantages.kl_penalty_fwd(*arguments)
        assert torch.equal(
            got.nan_to_num(7.0), reference.kl_penalty_fwd(*arguments).nan_to_num(7.0)
        )


@pytest.mark.parametrize("masked", ["identity", "carry"])
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(1.0, 1.0), (0.0, 0.5), (0.99, 0.0), (1.0, 0.95), (0.5, 0.5)]
)
def test_gae_at_every_width(instructions, masked, gamma, gae_lambda):
    for num_slots in WIDTHS:
        rewards, values, loss_mask, value_mask = sequences(num_slots)
        check("gae_fwd", (rewards, values, loss_mask, value_mask, None, gamma, gae_lambda, masked))
        check("discounted_returns_fwd", (rewards, loss_mask, value_mask, None, gamma))


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_whole_numbers_are_exact(instructions, gamma, gae_lambda):
    _, _, loss_mask, value_mask = sequences(100)
    rewards, values = torch.randint(-50, 50, (2, 9, 100)).float()
    arguments = rewards, values, loss_mask, value_mask, None, gamma, gae_lambda, "identity"
    for a, b in zip(
        native_advantages.gae_fwd(*arguments), reference.gae_fwd(*arguments), strict=True
    ):
        assert torch.equal(a, b)


def test_a_slot_that_is_trained_but_has_no_value(instructions):
    rewards, values, loss_mask, value_mask = sequences(100)
    check("gae_fwd", (rewards, values, value_mask, loss_mask, None, 0.9, 0.9, "identity"))
    check("gae_fwd", (rewards, values, ~loss_mask, loss_mask, None, 0.9, 0.9, "carry"))


@pytest.mark.parametrize("masked", ["identity", "carry"])
def test_padding_and_packing_change_no_bit(instructions, masked):
    rewards, values, loss_mask, value_mask = sequences(37)
    options = 0.97, 0.9, masked
    expected = native_advantages.gae_fwd(rewards, values, loss_mask, value_mask, None, *options)
    tensors = rewards, values, loss_mask, value_mask
    padded = [torch.nn.functional.pad(x, (0, 30)) for x in tensors]
    lengths = torch.randint(30, 38, (9,))
    kept = torch.arange(37) < lengths.unsqueeze(1)
    cut = [x.masked_fill(~kept, 0) for x in tensors]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    for got, want in zip(native_advantages.gae_fwd(*padded, None, *options), expected, strict=True):
        assert torch.equal(got[:, :37], want)
        assert (got[:, 37:] == 0).all()
    for got, want in zip(
        native_advantages.gae_fwd(*(x[kept] for x in cut), cu_seqlens, *options),
        native_advantages.gae_fwd(*cut, None, *options),
        strict=True,
    ):
        assert torch.equal(got, want[kept])


@pytest.mark.parametrize("slot", ["last", "after"])
@pytest.mark.parametrize("missing_eos", ["", "replace", "subtract"])
def test_shape_rewards_at_every_width(instructions, slot, missing_eos):
    for num_slots in WIDTHS:
        for max_length in (0, num_slots, num_slots + 5):
            check(
                "shape_rewards_fwd",
                shaping(num_slots, slot, missing_eos=missing_eos, max_length=max_length),
            )
    rest = shaping(100, missing_eos="")[1:]
    check("shape_rewards_fwd", (torch.where(rest[2], torch.randn(9, 100), torch.nan), *rest))


def test_moments_and_whitening_at_every_width(instructions):
    for shape in [(9, width) for width in WIDTHS] + [(5, 4099), (0, 3)]:
        mask = ragged_mask(*shape, holes=True) if shape[0] else torch.zeros(shape, dtype=torch.bool)
        x = torch.where(mask, torch.randn(shape) * 3 + 1000, torch.nan)
        moments = native_advantages.masked_moments_fwd(x, mask)
        assert moments.dtype == torch.float64
        torch.testing.assert_close(
            moments, reference.masked_moments_fwd(x.double(), mask), atol=0.0, rtol=1e-12
        )
        parts = torch.stack([moments, moments + torch.tensor([2.0, 1.0, 0.5])])
        for given in (None, parts):
            for shift_mean, unbiased in [(True, False), (False, True)]:
                check("masked_whiten_fwd", (x, mask, given, shift_mean, unbiased))


@pytest.mark.parametrize("slot", ["last", "after"])
@pytest.mark.parametrize(("whiten", "whiten_rewards"), [(True, False), (True, True), (False, True)])
def test_rewards_to_advantages_at_every_width(instructions, slot, whiten, whiten_rewards):
    for num_slots in WIDTHS[2:]:
        scores, logprobs, ref_logprobs, mask, *options = shaping(num_slots, slot)
        values = torch.randn(9, num_slots)
        for masked in ("identity", "carry"):
            numbers = 0.99, 0.95, masked, whiten, whiten_rewards, True
            arguments = scores, logprobs, ref_logprobs, values, mask, *options, *numbers
            check("rewards_to_advantages_fwd", arguments, 5e-6)


def everything(rewards, values, loss_mask, value_mask, dtype=torch.float32):
    """Every op on [B, 1000] tensors, the results in one list."""
    rewards, values = rewards.to(dtype), values.to(dtype)
    clean = torch.where(value_mask, rewards, 0), torch.where(value_mask, values, 0)
    rest = (
        None, None, 0.1, "k3", 0.0, "after", torch.inf, 1.0, "", 1.0, 0,
        0.99, 0.95, "identity", True, True, False,
    )  # fmt: skip
    ops = native_advantages
    return [
        *ops.gae_fwd(rewards, values, loss_mask, value_mask, None, 0.99, 0.95, "identity"),
        ops.discounted_returns_fwd(rewards, loss_mask, value_mask, None, 0.99),
        ops.kl_penalty_fwd(*clean, "k3", 0.0),
        *ops.kl_penalty_bwd(*clean, "k3", 0.0, clean[0]),
        *ops.shape_rewards_fwd(clean[0][:, 0], *clean, loss_mask, *rest[:11]),
        ops.masked_whiten_fwd(rewards, value_mask, None, True, False),
        ops.masked_moments_fwd(rewards, value_mask),
        *ops.rewards_to_advantages_fwd(clean[0][:, 0], *clean, clean[1], loss_mask, *rest),
    ]


def test_threads_change_no_bit(instructions):
    tensors = sequences(1000, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            results.append(everything(*tensors))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_neighbours_change_no_bit(instructions):
    rewards, values, loss_mask, value_mask = sequences(1000, 40)
    options = 0.99, 0.95, "identity"
    batch = native_advantages.gae_fwd(rewards, values, loss_mask, value_mask, None, *options)
    rows = slice(17, 18)
    tensors = (x[rows] for x in (rewards, values, loss_mask, value_mask))
    for got, want in zip(native_advantages.gae_fwd(*tensors, None, *options), batch, strict=True):
        assert torch.equal(got, want[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(instructions, dtype):
    tensors = sequences(1000, 6)
    halves = [x.to(dtype) for x in tensors[:2]]
    expected = everything(*(x.float() for x in halves), *tensors[2:])
    for i, (got, want) in enumerate(zip(everything(*tensors, dtype), expected, strict=True)):
        gradient = i in (4, 5)
        assert got.dtype == (dtype if gradient else want.dtype)
        assert torch.equal(got, want.to(got.dtype))


def test_strides_change_nothing(instructions):
    tensors = sequences(1000, 9)
    expected = everything(*tensors)
    for got, want in zip(everything(*(x.t().clone().t() for x in tensors)), expected, strict=True):
        assert torch.equal(got, want)


def test_float64_beside_float32_is_refused():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="values is float64, which the native kernels do not"):
        native_advantages.gae_fwd(x, x.double(), mask, mask, None, 1.0, 1.0, "identity")

"""The native losses: every instruction set and option, threads, half precision, layouts, NaN."""

import itertools

import pytest
import torch
from kernel_testing import assert_error_rule, ragged_mask

from fuserl_kernels import native
from fuserl_kernels.native_losses import pairwise_loss_native, ppo_loss_native
from fuserl_kernels.reference.pairwise import pairwise_loss_fwd
from fuserl_kernels.reference.policy import CorrectionOptions, PolicyOptions, ppo_loss_fwd

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)


DEFAULTS = PolicyOptions(
    ratio_level="token",
    clip="ppo",
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=0.0,
    gate_pos=0.0,
    gate_neg=0.0,
    gate_rate_pos=0.0,
    gate_rate_neg=0.0,
    log_ratio_clip=0.0,
    aggregation="token_mean",
    kl_coef=0.0,
    kl_estimator="k3",
    kl_clip=0.0,
    entropy_coef=0.0,
)
UNCORRECTED = CorrectionOptions("none", "token", 0.0, 3.0)
SAPO = {"clip": "sapo", "gate_pos": 1.0, "gate_neg": 1.05}
VESPO = {
    "clip": "vespo",
    "ratio_level": "sequence_sum",
    "gate_pos": 2.0,
    "gate_neg": 3.0,
    "gate_rate_pos": 3.0,
    "gate_rate_neg": 2.0,
}
OPTIONS = [
    {},
    {"dual_clip": 1.5},
    {"log_ratio_clip": 0.3},
    {"clip": "cispo", "log_ratio_clip": 0.3},
    {"clip": "none"},
    SAPO,
    SAPO | {"ratio_level": "sequence_mean", "log_ratio_clip": 0.05},
    VESPO,
    VESPO | {"gate_pos": 0.0, "aggregation": "sequence_mean"},
    {"ratio_level": "sequence_sum", "aggregation": "sequence_mean"},
    {"ratio_level": "sequence_mean", "aggregation": "sequence_sum"},
    {"ratio_level": "sequence_mean_token", "clip": "none"},
    {"ratio_level": "sequence_mean", "clip": "cispo"},
    *({"kl_coef": 0.3, "kl_estimator": name} for name in ("k1", "k2", "k3", "abs")),
    *({"kl_coef": 0.3, "kl_estimator": name, "kl_clip": 0.2} for name in ("k1", "k2", "k3", "abs")),
    {"kl_coef": 0.3, "entropy_coef": 0.1, "ratio_level": "sequence_mean"},
]
CORRECTIONS = [
    CorrectionOptions(name, level, 0.8, 1.3)
    for name in ("truncate", "mask", "reject")
    for level in ("token", "sequence_sum", "sequence_mean")
]


def problem(num_sequences=9, num_slots=37, spread=0.3, holes=True):
    """The tensors of ppo_loss in its order, float32; masked slots hold NaN."""
    mask = ragged_mask(num_sequences, num_slots, holes)
    value_mask = mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    old = -3 * torch.rand(mask.shape)
    new, ref, rollout = (old + spread * torch.randn(mask.shape) for _ in range(3))
    values, returns, advantages = torch.randn(3, *mask.shape)
    new_values = values + spread * torch.randn(mask.shape)
    entropy = torch.rand(mask.shape)
    policy = [torch.where(mask, x, torch.nan) for x in (new, old, advantages)]
    value = [torch.where(value_mask, x, torch.nan) for x in (new_values, values, returns)]
    extra = [torch.where(mask, x, torch.nan) for x in (ref, entropy, rollout)]
    return [*policy, *value, mask, value_mask], extra


def run(
    function,
    tensors,
    extra,
    options=DEFAULTS,
    corrections=UNCORRECTED,
    dtype=None,
    *,
    denominator=None,
    value_denominator=None,
    cu_seqlens=None,
):
    """loss, metrics, and the gradients multiplied by their scales, of ppo_loss with all extras."""

    def cast(tensor):
        convert = dtype is not None and tensor is not None and tensor.dtype.is_floating_point
        return tensor.to(dtype) if convert else tensor

    loss, metrics, scales, *gradients = function(
        *map(cast, tensors),
        0.5,
        0.2,
        value_denominator,
        denominator,
        cu_seqlens,
        *map(cast, extra),
        *options,
        *corrections,
        True,
    )
    of = (0, 0, 1)
    return loss, metrics, *(g * scales[i] for g, i in zip(gradients, of, strict=True))


def assert_as_good(tensors, extra, *choices, tolerance=3e-6, **arguments):
    """Native float32 against the reference in float64, by the error of the reference in float32."""
    mine = run(ppo_loss_native, tensors, extra, *choices, **arguments)
    peer = run(ppo_loss_fwd, tensors, extra, *choices, **arguments)
    truth = run(ppo_loss_fwd, tensors, extra, *choices, dtype=torch.float64, **arguments)
    for got, near, true in zip(mine, peer, truth, strict=True):
        assert got.shape == true.shape
        assert got.dtype == torch.float32
        room = tolerance * max(1.0, float(true.abs().max())) if true.numel() else 0.0
        assert_error_rule(got, near, true, room)


@pytest.mark.parametrize("changes", OPTIONS, ids=lambda changes: "-".join(map(str, changes)))
def test_every_option(instructions, changes):
    tensors, extra = problem()
    options = DEFAULTS._replace(**changes)
    assert_as_good(tensors, extra, options)
    if not options.kl_coef:
        assert_as_good(tensors, [None, None, None], options, denominator=torch.tensor(50))


@pytest.mark.parametrize("corrections", CORRECTIONS, ids=lambda c: f"{c.correction}-{c[1]}")
def test_every_correction(instructions, corrections):
    tensors, extra = problem(spread=0.2)
    assert_as_good(tensors, extra, DEFAULTS, corrections)
    assert_as_good(tensors, extra, DEFAULTS._replace(ratio_level="sequence_mean"), corrections)


@pytest.mark.parametrize("num_slots", [1, 2, 1023, 4096])
def test_lengths(instructions, num_slots):
    tensors, extra = problem(7, num_slots, spread=0.01, holes=False)
    for level, aggregation in [("token", "token_mean"), ("sequence_sum", "sequence_mean")]:
        options = DEFAULTS._replace(ratio_level=level, aggregation=aggregation)
        assert_as_good(tensors, extra, options, tolerance=2e-5)


@pytest.mark.parametrize("level", ["token", "sequence_mean"])
def test_packed_sequences_of_any_length(instructions, level):
    lengths = [0, 5000, 1, 0, 37, 9000, 3, 0]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    tensors, extra = problem(1, sum(lengths), spread=0.01)
    options = DEFAULTS._replace(ratio_level=level, kl_coef=0.1, aggregation="sequence_mean")
    tensors, extra = ([x.flatten() for x in part] for part in (tensors, extra))
    for dtype in (torch.int32, torch.int64):
        assert_as_good(tensors, extra, options, cu_seqlens=cu_seqlens.to(dtype), tolerance=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence_mean"])
def test_threads_change_no_bit(instructions, level):
    tensors, extra = problem(64, 2048)
    options = DEFAULTS._replace(ratio_level=level, kl_coef=0.1, entropy_coef=0.1)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            results.append(run(ppo_loss_native, tensors, extra, options))
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert not first.isnan().any()
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(instructions, dtype):
    """Read as they are, computed in float32, gradients rounded once."""
    tensors, extra = problem()
    options = DEFAULTS._replace(kl_coef=0.1, entropy_coef=0.1)
    rounded = [[x.to(dtype) if x.is_floating_point() else x for x in p] for p in (tensors, extra)]
    mine = run(ppo_loss_native, *rounded, options)
    exact = run(ppo_loss_native, *rounded, options, dtype=torch.float32)
    assert [x.dtype for x in mine] == [torch.float32] * 2 + [dtype] * 3
    for got, want in zip(mine[:2], exact[:2], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(mine[2:], exact[2:], strict=True):
        torch.testing.assert_close(got.float(), want, rtol=1.6e-2, atol=1e-6)


def test_a_float16_gradient_waits_for_its_scale():
    """1 / denominator would leave it nothing but a subnormal, before a loss scaler can help."""
    tensors, _ = problem(2, 8)
    half = [x.half() if x.is_floating_point() else x for x in tensors]
    for inputs, scale in [(tensors, 1.0), (half, 2.0**-20)]:
        arguments = (*inputs, 1.0, 0.2, torch.tensor(2.0**20), torch.tensor(2.0**20), None)
        scales = ppo_loss_native(*arguments, None, None, None, *DEFAULTS, *UNCORRECTED, True)[2]
        assert scales.tolist() == [scale, scale]


def test_no_gradients_where_none_are_wanted():
    tensors, extra = problem()
    arguments = (*tensors, 0.5, 0.2, None, None, None, *extra, *DEFAULTS, *UNCORRECTED)
    *with_gradients, _, _, _ = ppo_loss_native(*arguments, True)
    *without, grad_logprobs, grad_entropy, grad_values = ppo_loss_native(*arguments, False)
    for got, want in zip(without[:2], with_gradients[:2], strict=True):
        assert torch.equal(got, want)
    assert grad_logprobs.shape == grad_entropy.shape == grad_values.shape == (0,)


@pytest.mark.parametrize("clip", ["ppo", "cispo", "sapo", "none"])
@pytest.mark.parametrize("spoiled", ["new_logprobs", "logprobs", "advantages"])
def test_nan_in_a_trained_token_stays_nan(instructions, clip, spoiled):
    tensors, _ = problem()
    row, slot = tensors[6].nonzero()[20].tolist()
    tensors[["new_logprobs", "logprobs", "advantages"].index(spoiled)][row, slot] = torch.nan
    options = DEFAULTS._replace(clip=clip, gate_pos=1.0, gate_neg=1.0)
    loss, metrics, grad_logprobs, *_ = run(ppo_loss_native, tensors, [None] * 3, options)
    assert loss.isnan()
    assert metrics[0].isnan()
    assert grad_logprobs.isnan().nonzero().tolist() == [[row, slot]]


def test_nan_in_a_trained_value_stays_nan(instructions):
    for number in (3, 5):
        tensors, extra = problem()
        row, slot = tensors[7].nonzero()[20].tolist()
        tensors[number][row, slot] = torch.nan
        loss, _, _, _, grad_values = run(ppo_loss_native, tensors, extra)
        assert loss.isnan()
        assert grad_values.isnan().nonzero().tolist() == [[row, slot]]


@pytest.mark.parametrize("level", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_log_ratios_stay_finite(instructions, level, gap):
    tensors, _ = problem()
    tensors[0] = tensors[0] + gap
    for changes in ({}, {"clip": "none"}, {"clip": "cispo"}, SAPO, VESPO):
        options = DEFAULTS._replace(**(changes | {"ratio_level": level}))
        for result in run(ppo_loss_native, tensors, [None] * 3, options):
            assert result.isfinite().all()


def test_variance_of_returns_far_from_zero(instructions):
    tensors, extra = problem(64, 100)
    for number in (3, 4, 5):
        tensors[number] = 1000 + 0.1 * tensors[number]
    mine = run(ppo_loss_native, tensors, extra)[1]
    truth = run(ppo_loss_fwd, tensors, extra, dtype=torch.float64)[1]
    assert mine[12].item() == pytest.approx(truth[12].item(), abs=1e-6)


def test_layouts(instructions):
    """Transposed memory, and advantages that are a column expanded or one of each sequence."""
    tensors, extra = problem()
    tensors[2] = torch.randn(9)
    expected = run(ppo_loss_native, tensors, extra)
    expanded = tensors[2].unsqueeze(1).expand(9, 37)
    for advantages in (expanded, expanded.contiguous()):
        inputs = [x.t().contiguous().t() for x in tensors if x.dim() == 2]
        inputs.insert(2, advantages)
        for got, want in zip(run(ppo_loss_native, inputs, extra), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_pairs_with_one_float64_side():
    chosen, rejected = torch.randn(50), torch.randn(50, dtype=torch.float64)
    margin = torch.rand(50)
    mine = pairwise_loss_native(chosen, rejected, margin, 0.01, True)
    want = pairwise_loss_fwd(chosen, rejected, margin, 0.01, True)
    for got, expected in zip(mine, want, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


def test_far_apart_pairs_keep_infinities_and_nan():
    chosen = torch.tensor([1e15, -1e15, torch.inf, torch.nan])
    for number in range(4):
        one = chosen[number : number + 1]
        mine = pairwise_loss_native(one, torch.zeros(1), None, 0.0, True)
        want = pairwise_loss_fwd(one, torch.zeros(1), None, 0.0, True)
        for got, expected in zip(mine, want, strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True)

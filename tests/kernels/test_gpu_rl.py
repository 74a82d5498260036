"""The RL ops and the sampler on a real GPU: right, repeatable, without a wait, inside a graph."""

import functools

import pytest
import torch
from gpu_testing import assert_replays, assert_waits_for_nothing

import fuserl_kernels as fk

pytestmark = pytest.mark.gpu
covers = pytest.mark.covers
DEVICE = "cuda"
SIZES = [(512, 1024), (7, 4096), (1, 1)]


def batch(num_sequences, num_slots):
    """Ragged masks with holes; everything on the device."""
    lengths = torch.randint(0, num_slots + 1, (num_sequences, 1), device=DEVICE)
    lengths[0] = num_slots
    mask = torch.arange(num_slots, device=DEVICE) < lengths
    mask &= torch.rand(num_sequences, num_slots, device=DEVICE) > 0.1
    tensors = torch.randn(8, num_sequences, num_slots, device=DEVICE)
    tensors[1:4] = tensors[0] + 0.2 * tensors[1:4]  # log-probabilities of one another
    scores = torch.randn(num_sequences, device=DEVICE)
    return {"scores": scores, "mask": mask, "tensors": tensors.unbind()}


def ppo(data, **options):
    new, old, ref, _, advantages, values, new_values, returns = data["tensors"]
    leaves = [new.detach().requires_grad_(), new_values.detach().requires_grad_()]
    loss, metrics = fk.ppo_loss(
        leaves[0], old, advantages, leaves[1], values, returns, data["mask"],
        ref_logprobs=ref, kl_coef=0.05, **options,
    )  # fmt: skip
    return loss, *torch.autograd.grad(loss, leaves), *metrics.values()


def corrected(data):
    new, old, _, rollout, advantages, *_ = data["tensors"]
    leaf = new.detach().requires_grad_()
    loss, metrics = fk.policy_loss(
        leaf, old, advantages[:, 0], data["mask"], rollout_logprobs=rollout, correction="mask",
        correction_level="sequence_mean", ratio_level="sequence_mean", clip="sapo",
        aggregation="sequence_mean", correction_range=(0.9, 1.1),
    )  # fmt: skip
    return loss, *torch.autograd.grad(loss, leaf), *metrics.values()


def advantages_of(data, **options):
    _, old, ref, _, _, values, *_ = data["tensors"]
    return fk.rewards_to_advantages(
        data["scores"], old, ref, values, data["mask"], kl_coef=0.05, gamma=1.0, gae_lambda=0.95,
        estimator="k3", score_slot="after", has_eos=data["scores"] > 0, missing_eos="subtract",
        **options,
    )  # fmt: skip


def gae(data, **options):
    *_, rewards, values = data["tensors"]
    return fk.gae(rewards, values, data["mask"], gamma=0.99, **options)


def packed_gae(data):
    *_, rewards, values = data["tensors"]
    ends = torch.arange(0, rewards.numel() + 1, rewards.shape[1], device=DEVICE, dtype=torch.int32)
    return fk.gae(rewards.flatten(), values.flatten(), data["mask"].flatten(), cu_seqlens=ends)


def plain_policy(data):
    new, old, ref, _, advantages, *_ = data["tensors"]
    leaf, entropy = (x.detach().requires_grad_() for x in (new, -ref))
    loss, metrics = fk.policy_loss(
        leaf, old, advantages, data["mask"], ref_logprobs=ref, entropy=entropy, kl_coef=0.1,
        entropy_coef=0.01,
    )  # fmt: skip
    return loss, *torch.autograd.grad(loss, (leaf, entropy)), *metrics.values()


def value(data):
    *_, values, new_values, returns = data["tensors"]
    leaf = new_values.detach().requires_grad_()
    loss, metrics = fk.value_loss(leaf, values, returns, data["mask"])
    return loss, *torch.autograd.grad(loss, leaf), *metrics.values()


def pairwise(data):
    chosen, rejected = (x.flatten()[:4096].detach().requires_grad_() for x in data["tensors"][:2])
    loss, metrics = fk.pairwise_loss(chosen, rejected, margin=0.1, center_coef=0.01)
    return loss, *torch.autograd.grad(loss, (chosen, rejected)), *metrics.values()


CALLS = {
    "kl_penalty": lambda data: (fk.kl_penalty(*data["tensors"][:2], "k3", kl_clip=1.0),),
    "shape_rewards": lambda data: fk.shape_rewards(
        data["scores"], *data["tensors"][:2], data["mask"], kl_coef=0.1, score_clip=1.0
    ),
    "gae": gae,
    "gae carry": functools.partial(gae, masked="carry"),
    "gae packed": packed_gae,
    "discounted_returns": lambda data: (
        fk.discounted_returns(data["tensors"][6], data["mask"], gamma=0.9),
    ),
    "masked_moments": lambda data: (fk.masked_moments(data["tensors"][4], data["mask"]),),
    "masked_whiten": lambda data: (fk.masked_whiten(data["tensors"][4], data["mask"]),),
    "rewards_to_advantages": functools.partial(advantages_of, whiten=True),
    "with whitened rewards": functools.partial(advantages_of, whiten=True, whiten_rewards=True),
    "without whitening": functools.partial(advantages_of, whiten=False),
    "ppo_loss": ppo,
    "ppo_loss by sequence": functools.partial(ppo, ratio_level="sequence_mean"),
    "ppo_loss dual clip": functools.partial(ppo, dual_clip=3.0, log_ratio_clip=5.0),
    "policy_loss": plain_policy,
    "corrected policy_loss": corrected,
    "value_loss": value,
    "pairwise_loss": pairwise,
}


# The op that each name says, but for those that vary one.
OPS = {
    "gae carry": "gae",
    "gae packed": "gae",
    "with whitened rewards": "rewards_to_advantages",
    "without whitening": "rewards_to_advantages",
    "ppo_loss by sequence": "ppo_loss",
    "ppo_loss dual clip": "ppo_loss",
    "corrected policy_loss": "policy_loss",
}
EACH = [pytest.param(name, marks=covers(OPS.get(name, name))) for name in CALLS]


def in_float64(data):
    wide = [x.double().cpu() for x in data["tensors"]]
    return {"scores": data["scores"].double().cpu(), "mask": data["mask"].cpu(), "tensors": wide}


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_definition(name, size, monkeypatch):
    data = batch(*size)
    got = CALLS[name](data)
    again = CALLS[name](data)
    monkeypatch.setitem(globals(), "DEVICE", "cpu")
    with fk.use_backend("reference"):
        truth = CALLS[name](in_float64(data))
    for a, b, c in zip(got, truth, again, strict=True):
        assert not a.isnan().any()
        error = (a.detach().double().cpu() - b.detach()).abs() / b.abs().max().clamp(min=1e-3)
        # A ratio within rounding of the clip's edge may fall on its other side.
        assert (error > 2e-5).sum() <= 1e-5 * error.numel() + (error.numel() > 1)
        assert error.dim() or error <= 1e-4
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", EACH)
def test_waits_for_nothing(name):
    data = batch(64, 128)
    assert_waits_for_nothing(lambda: CALLS[name](data))


@pytest.mark.parametrize("name", EACH)
def test_inside_a_graph(name):
    data = batch(64, 128)

    def change():
        for tensor in data["tensors"]:
            tensor.mul_(0.9)

    assert_replays(lambda: CALLS[name](data), change)


@covers("ppo_loss", "policy_loss", "value_loss")
def test_two_streams_at_once():
    """What programs count tickets with is not shared between streams."""
    data = [batch(512, 512) for _ in range(2)]
    expected = [ppo(part) for part in data]
    streams = [torch.cuda.Stream() for _ in data]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(ppo(data[i]))
    torch.cuda.synchronize()
    for results, want in zip(found, expected, strict=True):
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


SAMPLING = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.95, "temperature": 0.8},
    "min_p": {"min_p": 0.01},
    "all": {"top_k": 1000, "top_p": 0.9, "min_p": 0.001, "temperature": 1.3},
}


@covers("sample_tokens")
@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab_size", [1001, 128256])
def test_sampler(name, dtype, vocab_size):
    logits = (2 * torch.randn(256, vocab_size, device=DEVICE)).to(dtype)
    logits[5] = -torch.inf
    logits[9, 3] = torch.nan
    requests = torch.randint(0, 2**40, (256,), device=DEVICE)
    positions = torch.randint(0, 2**20, (256,), device=DEVICE)
    keys = {"seed": 7, "request_ids": requests, "positions": positions}
    ids, logprobs, truncated = fk.sample_tokens(logits, **SAMPLING[name], **keys)
    broken = torch.zeros(256, dtype=torch.bool, device=DEVICE)
    broken[[5, 9]] = True
    assert (ids[broken] == -1).all()
    assert logprobs[broken].isnan().all()
    assert ((ids >= 0) & (ids < vocab_size))[~broken].all()
    same = fk.token_logprobs(
        logits[~broken], ids[~broken], temperature=SAMPLING[name].get("temperature", 1.0) or 1.0
    )
    assert torch.equal(same, logprobs[~broken])
    # The same request alone, elsewhere in a batch, and once more.
    some = torch.randperm(256, device=DEVICE)[:40]
    alone = {"seed": 7, "request_ids": requests[some], "positions": positions[some]}
    for a, b in zip(
        fk.sample_tokens(logits[some], **SAMPLING[name], **alone),
        (ids[some], logprobs[some], truncated[some]),
        strict=True,
    ):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    # The definition, but for draws within rounding of a step of the distribution.
    with fk.use_backend("reference"):
        want_ids, _, want_truncated = fk.sample_tokens(logits, **SAMPLING[name], **keys)
    equal = want_ids == ids
    assert equal.float().mean() > 0.97
    both = equal & ~broken
    torch.testing.assert_close(truncated[both], want_truncated[both], atol=1e-4, rtol=1e-4)

"""Tensors of more than 2^31 elements on a real GPU: what lies past it equals the same rows alone.

Each test holds 60 GB at most, and gives it back."""

import pytest
import torch

import fuserl_kernels as fk

covers = pytest.mark.covers
pytestmark = [pytest.mark.gpu, pytest.mark.large]
DEVICE = "cuda"
NUM_SLOTS = 1024
NUM_SEQUENCES = (1 << 31) // NUM_SLOTS + 5
LAST = slice(-3, None)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def tokens() -> torch.Tensor:
    """[B, T] of bf16, 4.3 GB."""
    return drawn(NUM_SEQUENCES, NUM_SLOTS)


def last_mask() -> torch.Tensor:
    """Only the last sequences count."""
    mask = torch.zeros(NUM_SEQUENCES, NUM_SLOTS, dtype=torch.bool, device=DEVICE)
    mask[LAST] = True
    return mask


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def assert_close_to_scale(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() < 2e-2 * want.abs().max()


@covers("token_logprobs")
def test_logits_and_their_gradient():
    vocab_size = 151936
    leaf = drawn((1 << 31) // vocab_size + 5, vocab_size).requires_grad_()
    token_ids = torch.arange(len(leaf), device=DEVICE) * 10
    logprobs = fk.token_logprobs(leaf, token_ids)
    last = leaf[LAST].detach().requires_grad_()
    alone = fk.token_logprobs(last, token_ids[LAST])
    assert torch.equal(logprobs[LAST], alone)
    (whole,) = torch.autograd.grad(logprobs.sum(), leaf)
    assert torch.equal(whole[LAST], torch.autograd.grad(alone.sum(), last)[0])


@covers("linear_token_logprobs", "linear_policy_loss")
def test_a_weight_and_its_gradient():
    hidden_size, vocab_size = 16384, 131072 + 64
    weight = (drawn(vocab_size, hidden_size) * hidden_size**-0.5).requires_grad_()
    hidden = drawn(4, hidden_size).requires_grad_()
    token_ids = torch.tensor([3, vocab_size - 1, vocab_size - 70, 9], device=DEVICE)
    some = torch.tensor([0, 9, vocab_size - 70, vocab_size - 1], device=DEVICE)
    with torch.no_grad():
        truth = torch.log_softmax(hidden.float() @ weight.float().t(), -1)
        chosen = truth.gather(-1, token_ids[:, None])[:, 0]
        gradient = -truth.exp()  # of the sum of the log-probabilities
        gradient[torch.arange(4), token_ids] += 1
        rows = gradient[:, some].t() @ hidden.float()
        inputs = gradient.bfloat16() @ weight
    logprobs = fk.linear_token_logprobs(hidden, weight, token_ids)
    torch.testing.assert_close(logprobs, chosen, atol=2e-5, rtol=1e-5)
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert_close_to_scale(grads[0], inputs)
    assert_close_to_scale(grads[1][some], rows)
    del grads
    # The ratio is 1, so the loss is the negative mean, and so is its gradient.
    ones = torch.ones(4, device=DEVICE)
    loss, _ = fk.linear_policy_loss(hidden, weight, token_ids, chosen, ones, ones > 0)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert_close_to_scale(grads[0], -inputs / 4)
    assert_close_to_scale(grads[1][some], -rows / 4)


@covers("sample_tokens")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampled_logits(temperature):
    logits = torch.zeros(17_000, 151_936, device=DEVICE, dtype=torch.bfloat16)
    logits[:, 1000] = 50.0
    ids, logprobs, _ = fk.sample_tokens(logits, seed=0, top_p=0.9, temperature=temperature)
    assert (ids == 1000).all()
    assert torch.equal(logprobs, logprobs[:1].expand_as(logprobs))


KINDS = [
    pytest.param("rms", marks=covers("rms_norm")),
    pytest.param("layer", marks=covers("layer_norm")),
]


@pytest.mark.parametrize("width", [128, 16384, 20001])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_norm(kind, width):
    num_rows = (1 << 31) // width + 100
    x = torch.zeros(num_rows, width, dtype=torch.bfloat16, device=DEVICE)
    x[LAST] = drawn(3, width)
    x.requires_grad_()
    weight, bias = torch.ones(2, width, device=DEVICE, dtype=torch.bfloat16).unbind()
    weight.requires_grad_()

    def norm(rows):
        return fk.rms_norm(rows, weight) if kind == "rms" else fk.layer_norm(rows, weight, bias)

    y = norm(x)
    last = x[LAST].detach().requires_grad_()
    expected = norm(last)
    assert torch.equal(y[LAST], expected)
    grads = torch.autograd.grad(y, (x, weight), y.detach())
    wanted = torch.autograd.grad(expected, (last, weight), expected.detach())
    assert torch.equal(grads[0][LAST], wanted[0])
    # The other rows are 0 once normalised, so they add nothing to the weight's gradient.
    torch.testing.assert_close(grads[1], wanted[1])


@covers("glu")
def test_gates():
    gate_up = drawn(1, 2 * 16384).repeat(70_000, 1).requires_grad_()
    assert gate_up.numel() > 1 << 31
    out = fk.glu(gate_up)
    assert torch.equal(out[-1], out[0])
    (grad,) = torch.autograd.grad(out, gate_up, out.detach())
    assert torch.equal(grad[-1], grad[0])


HEADS = {"num_heads": 32, "num_kv_heads": 8}
ROW = (32 + 2 * 8) * 128


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    angle = drawn(4096, 64, dtype=torch.float32)
    return angle.cos(), angle.sin()


@covers("rotary")
def test_heads():
    num_tokens = (1 << 31) // ROW + 100
    qkv = drawn(1, ROW).repeat(num_tokens, 1).requires_grad_()
    positions = torch.full((num_tokens,), 1234, device=DEVICE)
    outputs = fk.rotary(qkv, *angles(), positions, **HEADS)
    for heads in outputs:
        assert torch.equal(heads[-1], heads[0])
    (grad,) = torch.autograd.grad(outputs, qkv, [x.detach() for x in outputs])
    assert torch.equal(grad[-1], grad[0])


@covers("rotary_kv_write")
def test_a_cache_that_is_written():
    num_slots, capacity = 66, 32768
    caches = [
        torch.zeros(num_slots, 8, capacity, 128, dtype=torch.bfloat16, device=DEVICE)
        for _ in range(2)
    ]
    assert caches[0].numel() > 1 << 31
    inputs = [drawn(2, ROW), *angles(), torch.tensor([5, 4000], device=DEVICE)]
    slots = torch.tensor([num_slots - 1, 0], device=DEVICE)
    offsets = torch.tensor([capacity - 1, 7], device=DEVICE)
    query, *written = fk.rotary(*inputs, **HEADS)
    found = fk.rotary_kv_write(*inputs, *caches, slots, offsets, **HEADS)
    assert torch.equal(found, query)
    for cache, heads in zip(caches, written, strict=True):
        assert torch.equal(cache[slots, :, offsets], heads)
        cache[slots, :, offsets] = 0
        assert not any(slot.any() for slot in cache)


@covers("decode_attention")
@pytest.mark.parametrize("of_prefix", [False, True])
def test_a_cache_that_is_read(of_prefix):
    """The last slot, or the last prefix, of more than can be counted in 32 bits."""
    num_slots, capacity = 66, 32768
    cache = torch.empty(num_slots, 8, capacity, 128, dtype=torch.bfloat16, device=DEVICE)
    assert cache.numel() > 1 << 31
    cache[-1].normal_()
    query = drawn(1, 32, 128)
    full = torch.tensor([capacity], device=DEVICE)
    numbers = torch.arange(num_slots, device=DEVICE)

    def attend(memory, index):
        if not of_prefix:
            return fk.decode_attention(query, memory, memory, full, slots=index)
        return fk.decode_attention(
            query, memory[:1, :, :4], memory[:1, :, :4], full * 0, prefix_keys=memory,
            prefix_values=memory, prefix_ids=index, prefix_lengths=full.repeat(len(memory)),
        )  # fmt: skip

    got = attend(cache, numbers[-1:])
    assert torch.equal(got, attend(cache[-1:].clone(), numbers[:1]))
    grouped, keys = query.float().view(8, 4, 128), cache[-1].float()
    truth = torch.softmax(grouped @ keys.mT * 128**-0.5, -1) @ keys
    torch.testing.assert_close(got.float(), truth.view(1, 32, 128), atol=2e-2, rtol=2e-2)


@covers("gae", "discounted_returns")
def test_advantages():
    rewards, mask = tokens(), torch.ones(1, device=DEVICE).bool()
    mask = mask.expand(NUM_SEQUENCES, NUM_SLOTS).contiguous()
    for got, want in zip(
        fk.gae(rewards, rewards, mask),
        fk.gae(rewards[LAST].clone(), rewards[LAST].clone(), mask[LAST].clone()),
        strict=True,
    ):
        assert_near(got[LAST], want)
    got = fk.discounted_returns(rewards, mask, gamma=0.9)
    want = fk.discounted_returns(rewards[LAST].clone(), mask[LAST].clone(), gamma=0.9)
    assert_near(got[LAST], want)


@covers("kl_penalty")
def test_penalties():
    logprobs = tokens()
    other = logprobs.flip(0)
    got = fk.kl_penalty(logprobs, other, "k3")
    assert_near(got[LAST], fk.kl_penalty(logprobs[LAST].clone(), other[LAST].clone(), "k3"))


@covers("shape_rewards", "rewards_to_advantages", "masked_whiten", "masked_moments")
def test_from_scores_to_advantages():
    scores = drawn(NUM_SEQUENCES, dtype=torch.float32)
    logprobs, mask = tokens(), last_mask()
    alone = scores[LAST].clone(), logprobs[LAST].clone(), mask[LAST].clone()
    for got, want in zip(
        fk.shape_rewards(scores, logprobs, logprobs, mask, kl_coef=0.1),
        fk.shape_rewards(alone[0], alone[1], alone[1], alone[2], kl_coef=0.1),
        strict=True,
    ):
        assert_near(got[LAST], want)
    options = {"kl_coef": 0.1, "gamma": 1.0, "gae_lambda": 0.95}
    options |= {"whiten": True, "whiten_rewards": True}
    for got, want in zip(
        fk.rewards_to_advantages(scores, *[logprobs] * 3, mask, **options),
        fk.rewards_to_advantages(alone[0], *[alone[1]] * 3, alone[2], **options),
        strict=True,
    ):
        assert_near(got[LAST], want)
    assert_near(fk.masked_moments(logprobs, mask), fk.masked_moments(alone[1], alone[2]))
    got = fk.masked_whiten(logprobs, mask)
    assert_near(got[LAST], fk.masked_whiten(alone[1], alone[2]))
    assert not got[0].any()


def policy(x, mask):
    leaf = x.detach().requires_grad_()
    loss, metrics = fk.policy_loss(leaf, x, x, mask)
    return torch.autograd.grad(loss, leaf)[0], loss.detach(), metrics


def value(x, mask):
    leaf = x.detach().requires_grad_()
    loss, metrics = fk.value_loss(leaf, x, x + 1, mask)
    return torch.autograd.grad(loss, leaf)[0], loss.detach(), metrics


def both(x, mask):
    leaf = x.detach().requires_grad_()
    loss, metrics = fk.ppo_loss(leaf, x, x, leaf, x, x, mask, ratio_level="sequence_mean")
    return torch.autograd.grad(loss, leaf)[0], loss.detach(), metrics


LOSSES = {"policy_loss": policy, "value_loss": value, "ppo_loss": both}


@pytest.mark.parametrize("op", [pytest.param(op, marks=covers(op)) for op in LOSSES])
def test_losses(op):
    x, mask = tokens(), last_mask()
    gradient, loss, metrics = LOSSES[op](x, mask)
    alone = LOSSES[op](x[LAST].clone(), mask[LAST].clone())
    assert_near(loss, alone[1])
    torch.testing.assert_close(gradient[LAST], alone[0])
    assert not gradient[0].any()
    for name, number in metrics.items():
        assert_near(number, alone[2][name])

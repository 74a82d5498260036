"""The log-probability ops on a real GPU, through the public functions, as a trainer calls them."""

import pytest
import torch
from kernel_testing import assert_error_rule, ragged_mask

import fuserl_kernels as fk

pytestmark = pytest.mark.gpu
covers = pytest.mark.covers
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE = [32000, 128256, 151936]
VALUE_TOLERANCE = 2e-5  # float32 sums of bf16 products over D, in different orders
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def head(dtype, num_rows, hidden_size, vocab_size):
    hidden = torch.randn(num_rows, hidden_size, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size, device=DEVICE) * hidden_size**-0.5).to(dtype)
    return hidden, weight, torch.randint(vocab_size, (num_rows,), device=DEVICE)


def dense(hidden, weight, token_ids, temperature=1.0, softcap=None):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = torch.log_softmax(logits / temperature, -1)
    return logp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def assert_close_to_scale(got, want, tolerance):
    """Largest error, as a part of the largest entry."""
    assert not got.isnan().any()
    error = (got.double() - want.double()).abs().max()
    assert error <= tolerance * want.double().abs().max(), float(error)


@covers("token_logprobs")
@pytest.mark.parametrize("vocab_size", [1, 1001, *LARGE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_whole_batch(dtype, vocab_size):
    logits = (torch.randn(2048, vocab_size, device=DEVICE) * 2).to(dtype)
    token_ids = torch.randint(vocab_size, (2048,), device=DEVICE)
    logprobs, entropy = fk.token_logprobs(logits, token_ids, return_entropy=True)
    some = torch.randint(2048, (64,), device=DEVICE)
    logp = torch.log_softmax(logits[some].double(), -1)
    truth = logp.gather(-1, token_ids[some].unsqueeze(-1)).squeeze(-1)
    peer = torch.log_softmax(logits[some].float(), -1)
    peer_chosen = peer.gather(-1, token_ids[some].unsqueeze(-1)).squeeze(-1)
    assert_error_rule(logprobs[some], peer_chosen, truth, 2e-6)
    true_entropy = -(logp.exp() * logp).sum(-1)
    assert_error_rule(entropy[some], -(peer.exp() * peer).sum(-1), true_entropy, 5e-6)


@covers("token_logprobs")
@pytest.mark.parametrize("vocab_size", [1001, 128256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_rows(dtype, vocab_size):
    """Of log-probabilities and entropies, also of rows that do not lie side by side."""
    logits = (torch.randn(400, 2, vocab_size, device=DEVICE) * 2).to(dtype)[:, 0]
    token_ids = torch.randint(vocab_size, (400,), device=DEVICE)
    g, h = torch.randn(2, 400, device=DEVICE)

    def gradient(function, cast):
        leaf = logits.to(cast).detach().requires_grad_()
        outputs = function(leaf)
        return torch.autograd.grad(outputs, leaf, [x.to(outputs[0].dtype) for x in (g, h)])[0]

    def eager(leaf):
        logp = torch.log_softmax(leaf, -1)
        return logp.gather(-1, token_ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    mine = gradient(lambda leaf: fk.token_logprobs(leaf, token_ids, return_entropy=True), dtype)
    truth = gradient(eager, torch.float64)
    assert_error_rule(mine, gradient(eager, torch.float32).to(dtype), truth, 2e-6)


@covers("token_logprobs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_gradient_needs_no_second_buffer(dtype):
    leaf = torch.randn(1024, 128256, device=DEVICE, dtype=dtype, requires_grad=True)
    token_ids = torch.randint(128256, (1024,), device=DEVICE)
    (expected,) = torch.autograd.grad(fk.token_logprobs(leaf, token_ids).sum(), leaf)
    logits = leaf * 1
    logprobs = fk.token_logprobs(logits, token_ids, inplace_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert torch.equal(gradient, expected)


@covers("linear_token_logprobs")
@pytest.mark.parametrize("vocab_size", [1280, *LARGE])
@pytest.mark.parametrize("hidden_size", [33, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_token_logprobs(dtype, hidden_size, vocab_size, softcap):
    hidden, weight, token_ids = head(dtype, 127, hidden_size, vocab_size)
    g, h = torch.randn(2, 127, device=DEVICE)

    def run(function, cast, **options):
        leaves = [hidden.to(cast).requires_grad_(), weight.to(cast).requires_grad_()]
        outputs = function(*leaves, token_ids, temperature=0.8, softcap=softcap, **options)
        grads = [x.to(outputs[0].dtype) for x in (g, h)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    truth = run(dense, torch.float64)
    mine = run(fk.linear_token_logprobs, dtype, return_entropy=True)
    for got, want in zip(mine[:2], truth[:2], strict=True):
        torch.testing.assert_close(got.double(), want, atol=VALUE_TOLERANCE, rtol=1e-5)
    for got, want in zip(mine[2:], truth[2:], strict=True):
        assert got.dtype == dtype
        assert_close_to_scale(got, want, GRADIENT_TOLERANCE[dtype])


@covers("linear_policy_loss")
@pytest.mark.parametrize("level", ["token", "sequence_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows_per_chunk", [64, 1 << 20])
def test_linear_policy_loss_equals_its_parts(dtype, level, rows_per_chunk, monkeypatch):
    monkeypatch.setattr("fuserl_kernels.projection.chunk_rows", lambda *_: rows_per_chunk)
    hidden, weight, token_ids = head(dtype, 6 * 40, 64, 3001)
    hidden, token_ids = hidden.view(6, 40, 64), token_ids.view(6, 40)
    mask = ragged_mask(6, 40, holes=True).to(DEVICE)
    bias = torch.randn(3001, device=DEVICE).to(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    options = {"ratio_level": level, "kl_coef": 0.1, "entropy_coef": 0.05}
    with torch.no_grad():
        old = fk.linear_token_logprobs(hidden, weight, token_ids, bias=bias)
    old = old + 0.3 * torch.randn_like(old)
    options["ref_logprobs"] = old + 0.3 * torch.randn_like(old)
    advantages = torch.randn(6, 40, device=DEVICE)

    wide = [x.detach().double().requires_grad_() for x in leaves]
    logprobs, entropy = fk.linear_token_logprobs(
        *wide[:2], token_ids, bias=wide[2], loss_mask=mask, return_entropy=True
    )
    truth, _ = fk.policy_loss(
        logprobs, old.double(), advantages.double(), mask, entropy=entropy, **options
    )
    loss, _ = fk.linear_policy_loss(
        *leaves[:2], token_ids, old, advantages, mask, bias=bias, **options
    )
    torch.testing.assert_close(loss.double(), truth, atol=VALUE_TOLERANCE, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True
    ):
        assert_close_to_scale(got, want, GRADIENT_TOLERANCE[dtype])


@covers("linear_token_logprobs", "linear_policy_loss")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_paths_agree_on_the_first_ratio(dtype):
    """The fused forward and the chunked product differ in rounding only: the bound on
    |log ratio| of a batch's first update."""
    hidden, weight, token_ids = head(dtype, 512, 1024, 32000)
    mask = torch.ones(512, dtype=torch.bool, device=DEVICE)
    with torch.no_grad():
        old = fk.linear_token_logprobs(hidden, weight, token_ids)
    _, metrics = fk.linear_policy_loss(
        hidden.requires_grad_(), weight, token_ids, old, torch.randn(512, device=DEVICE), mask
    )
    assert abs(metrics["val/ratio"].item() - 1) < 1e-5
    assert metrics["policy/approxkl"].item() < 0.5 * VALUE_TOLERANCE**2
    assert metrics["policy/clipfrac"].item() == 0


@covers("linear_policy_loss")
def test_memory_of_a_large_update():
    """N = 8192, D = 1024, V = 128256 in bf16: under 1.5 GB beyond inputs and gradients, where the
    weight's gradient is summed in float32 into a tensor of the caller's. The first update chooses
    kernels by their time, in memory of its own."""
    hidden, weight, token_ids = head(torch.bfloat16, 8192, 1024, 128256)
    old, advantages = torch.randn(2, 8192, device=DEVICE)
    mask = torch.ones(8192, dtype=torch.bool, device=DEVICE)
    total = torch.zeros(128256, 1024, device=DEVICE)
    hidden.requires_grad_()

    def update():
        loss, _ = fk.linear_policy_loss(
            hidden, weight, token_ids, old - 10, advantages, mask, weight_grad=total
        )
        loss.backward()

    update()
    hidden.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    update()
    extra = torch.cuda.max_memory_allocated() - before - hidden.grad.nbytes
    assert extra < 1.5e9, extra
    assert total.isfinite().all()


@covers("linear_token_logprobs")
def test_compiles_whole():
    hidden, weight, token_ids = head(torch.bfloat16, 64, 64, 1000)
    hidden.requires_grad_()
    call = torch.compile(
        lambda h: fk.linear_token_logprobs(h, weight, token_ids).sum(), fullgraph=True
    )
    (got,) = torch.autograd.grad(call(hidden), hidden)
    (want,) = torch.autograd.grad(fk.linear_token_logprobs(hidden, weight, token_ids).sum(), hidden)
    torch.testing.assert_close(got, want)

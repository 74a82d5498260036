"""linear_token_logprobs: equal to token_logprobs of the dense logits, chunked or not."""

import itertools

import pytest
import torch
from kernel_testing import assert_error_rule, opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels.linear_token_logprobs import FORWARD

BACKENDS = runnable(FORWARD)


def dense(hidden, weight, token_ids, bias=None, softcap=None, **options):
    logits = hidden @ weight.t()
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    with fk.use_backend("reference"):
        return fk.token_logprobs(logits, token_ids, return_entropy=True, **options)


def gradients(outputs, weights, leaves):
    return torch.autograd.grad(list(outputs), leaves, [w.to(outputs[0].dtype) for w in weights])


def inputs(dtype=torch.float32, shape=(4, 5), dim=8, vocab_size=30):
    hidden = torch.randn(*shape, dim).to(dtype)
    weight = (torch.randn(vocab_size, dim) * 0.7).to(dtype)
    bias = torch.randn(vocab_size).to(dtype)
    return hidden, weight, bias, torch.randint(0, vocab_size, shape)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_dense_logits(backend, rows_per_chunk, softcap, with_bias, monkeypatch):
    hidden, weight, bias, token_ids = inputs()
    monkeypatch.setattr("fuserl_kernels.projection.chunk_rows", lambda *_: rows_per_chunk)
    mask = torch.rand(4, 5) > 0.3
    temperature = torch.rand(4, 5) + 0.5
    g, h = torch.randn(4, 5), torch.randn(4, 5)
    options = {
        "bias": bias.requires_grad_() if with_bias else None,
        "softcap": softcap,
        "temperature": temperature,
        "loss_mask": mask,
    }
    leaves = [hidden.requires_grad_(), weight.requires_grad_()] + [bias] * with_bias
    expected = dense(hidden, weight, token_ids, **options)
    expected_gradients = gradients(expected, (g, h), leaves)
    with fk.use_backend(backend):
        got = fk.linear_token_logprobs(hidden, weight, token_ids, return_entropy=True, **options)
        got_gradients = gradients(got, (g, h), leaves)
    for a, b in zip((*got, *got_gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_more_than_pytorch_makes(backend, dtype):
    check_error(backend, dtype, num_rows=16, dim=64, vocab_size=1000)


# The interpreter walks tiles one by one: one large vocabulary there, all of them elsewhere.
LARGE = [(b, v) for b in BACKENDS for v in (32000, 128256, 151936) if b != "triton" or v == 32000]


@pytest.mark.parametrize(
    ("backend", "vocab_size"), [*itertools.product(BACKENDS, (1, 2, 1280)), *LARGE]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_sizes_and_an_odd_hidden_size(backend, vocab_size, dtype):
    check_error(backend, dtype, num_rows=3, dim=33, vocab_size=vocab_size)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
@pytest.mark.parametrize("num_rows", [1, 127, 8192])
def test_row_counts(backend, num_rows):
    check_error(backend, torch.float32, num_rows=num_rows, dim=5, vocab_size=300)


def check_error(backend, dtype, *, num_rows, dim, vocab_size):
    hidden, weight, _, token_ids = inputs(dtype, (num_rows,), dim, vocab_size)
    g, h = torch.randn(num_rows), torch.randn(num_rows)

    def run(function, cast):
        leaves = [hidden.to(cast).requires_grad_(), weight.to(cast).requires_grad_()]
        outputs = function(*leaves, token_ids)
        return [*outputs, *gradients(outputs, (g, h), leaves)]

    truth = run(dense, torch.float64)
    # Values are held to PyTorch's float32 products, whatever the dtype: bf16 throughout is off by
    # 0.03. From bf16 operands a CPU keeps 17 bits or more of a logit. Gradients come back in the
    # dtype and are held to PyTorch's in the dtype.
    values, narrow = run(dense, torch.float32)[:2], run(dense, dtype)[2:]
    with fk.use_backend(backend):
        mine = run(lambda *tensors: fk.linear_token_logprobs(*tensors, return_entropy=True), dtype)
    largest_logit = float(
        hidden.detach().double().norm(dim=-1).max() * weight.double().norm(dim=-1).max()
    )
    tolerance = 5e-6 + (2.0**-17 * largest_logit if dtype == torch.bfloat16 else 0)
    for got, peer, true in zip(mine[:2], values, truth[:2], strict=True):
        assert_error_rule(got, peer.detach(), true.detach(), tolerance)
    for got, peer, true in zip(mine[2:], narrow, truth[2:], strict=True):
        rounding = 1e-6 if dtype == torch.float32 else 4e-3
        if backend == "triton":  # backward's products are others than forward's: p is off by that
            rounding = max(rounding, 3e-5)
        assert_error_rule(got, peer, true, rounding * max(1.0, float(true.abs().max())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_leak_nothing(backend):
    hidden, weight, _, token_ids = inputs()
    mask = torch.rand(4, 5) > 0.5
    clean = [x.clone().requires_grad_() for x in (hidden, weight)]
    expected = fk.linear_token_logprobs(*clean, token_ids, loss_mask=mask)
    expected.sum().backward()
    hidden = torch.where(mask.unsqueeze(-1), hidden, torch.nan).requires_grad_()
    weight.requires_grad_()
    token_ids = torch.where(mask, token_ids, 12345)
    with fk.use_backend(backend):
        logprobs = fk.linear_token_logprobs(hidden, weight, token_ids, loss_mask=mask)
        logprobs.backward(torch.where(mask, 1.0, torch.nan))
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(hidden.grad, clean[0].grad)
    torch.testing.assert_close(weight.grad, clean[1].grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_trained(backend, num_rows):
    hidden = torch.randn(num_rows, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    with fk.use_backend(backend):
        loss = fk.linear_token_logprobs(
            hidden,
            weight,
            torch.zeros(num_rows, dtype=torch.long),
            loss_mask=torch.zeros(num_rows, dtype=torch.bool),
        ).sum()
        loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_gradients_only_where_asked():
    hidden, weight, _, token_ids = inputs()
    weight.requires_grad_()
    fk.linear_token_logprobs(hidden, weight, token_ids).sum().backward()
    assert hidden.grad is None
    assert weight.grad.abs().sum() > 0


@pytest.mark.skipif("native" not in BACKENDS, reason="native kernels are not built")
def test_switching_between_forward_and_backward():
    hidden, weight, _, token_ids = inputs()
    results = []
    for first, second in [("reference", "native"), ("native", "reference")]:
        leaf = weight.clone().requires_grad_()
        with fk.use_backend(first):
            logprobs = fk.linear_token_logprobs(hidden, leaf, token_ids, softcap=5.0)
        with fk.use_backend(second):
            logprobs.sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-5)


def test_gradcheck():
    hidden, weight, bias, token_ids = inputs(torch.float64, (3,), 4, 6)
    torch.autograd.gradcheck(
        lambda hidden, weight, bias: fk.linear_token_logprobs(
            hidden,
            weight,
            token_ids,
            bias=bias,
            softcap=4.0,
            temperature=0.8,
            loss_mask=torch.tensor([True, False, True]),
            return_entropy=True,
        ),
        [x.requires_grad_() for x in (hidden, weight, bias)],
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight, bias, token_ids = inputs(shape=(3,), dim=4, vocab_size=7)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    mask = torch.tensor([True, False, True])
    with fk.use_backend(backend):
        opcheck("linear_token_logprobs", *leaves, token_ids, None, 0.7, 5.0, mask, True)
        opcheck("linear_token_logprobs", *leaves[:2], None, token_ids, None, 1.0, 0.0, None, False)


BAD = {
    "hidden must have shape": {"hidden": torch.zeros(2, 5)},
    "weight must have shape": {"weight": torch.zeros(4)},
    "weight must be torch.float32 like hidden": {"weight": torch.zeros(6, 4).double()},
    "bias must have shape": {"bias": torch.zeros(4)},
    "softcap .*0": {"softcap": 0.0},
    r"token_ids must be in \[0, 6\)": {"token_ids": torch.tensor([0, 6])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(6, 4),
        "token_ids": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        fk.linear_token_logprobs(**(arguments | BAD[message]))

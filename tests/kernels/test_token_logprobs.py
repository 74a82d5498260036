"""token_logprobs: every implementation against float64, hostile rows, masks, strides, gradients."""

import pytest
import torch
from kernel_testing import assert_error_rule, opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import native
from fuserl_kernels.token_logprobs import FORWARD

BACKENDS = runnable(FORWARD)
# Of the gradient's largest entry: half a unit in the last place. Triton's interpreter rounds bf16
# towards zero, which GPUs do not: a whole unit.
GRAD_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
INTERPRETED_TOLERANCE = {**GRAD_TOLERANCE, torch.bfloat16: 8e-3}


def plain(logits, token_ids, temperature=1.0, softcap=None):
    """The formula through PyTorch's autograd, in the dtype of logits; entropy safe for -inf."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(logits.dtype).unsqueeze(-1)
    logp = torch.log_softmax(logits / temperature, -1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    return logp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1), entropy


def with_gradient(function, logits, g, h):
    logits = logits.clone().requires_grad_()
    logprobs, entropy = function(logits)
    (logprobs * g + entropy * h).sum().backward()
    return logprobs.detach(), entropy.detach(), logits.grad


def grad_tolerance(backend):
    return INTERPRETED_TOLERANCE if backend == "triton" else GRAD_TOLERANCE


def ours(token_ids, temperature=1.0, softcap=None):
    return lambda logits: fk.token_logprobs(
        logits, token_ids, temperature=temperature, softcap=softcap, return_entropy=True
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 1000, 1280, 32000, 128256, 151936])
def test_error_is_no_more_than_pytorch_makes(backend, dtype, vocab_size):
    logits = (torch.randn(3, vocab_size) * 4).to(dtype)
    token_ids = torch.randint(0, vocab_size, (3,))
    temperature = torch.tensor([0.7, 1.0, 1.9])
    g, h = torch.randn(3), torch.randn(3)
    truth = with_gradient(
        lambda x: plain(x, token_ids, temperature), logits.double(), g.double(), h.double()
    )
    # Statistics are float32 whatever the input, so the peer gets float32 logits too.
    peer = with_gradient(lambda x: plain(x, token_ids, temperature), logits.float(), g, h)
    with fk.use_backend(backend):
        mine = with_gradient(ours(token_ids, temperature), logits, g, h)
    assert mine[0].dtype == mine[1].dtype == torch.float32
    assert mine[2].dtype == dtype
    assert_error_rule(mine[0], peer[0], truth[0], 2e-6)
    assert_error_rule(mine[1], peer[1], truth[1], 5e-6)
    tolerance = 1e-7 + grad_tolerance(backend)[dtype] * truth[2].abs().max()
    assert_error_rule(mine[2], peer[2], truth[2], float(tolerance))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [2.0, 30.0])
def test_softcap(backend, dtype, softcap):
    logits = (torch.randn(5, 1001) * 20).to(dtype)
    token_ids = torch.randint(0, 1001, (5,))
    g, h = torch.randn(5), torch.randn(5)
    temperature = torch.tensor([0.5, 0.8, 1.0, 1.3, 2.0])
    arguments = (token_ids, temperature, softcap)
    truth = with_gradient(lambda x: plain(x, *arguments), logits.double(), g.double(), h.double())
    peer = with_gradient(lambda x: plain(x, *arguments), logits.float(), g, h)
    with fk.use_backend(backend):
        mine = with_gradient(ours(*arguments), logits, g, h)
    for got, want, true, tolerance in zip(
        mine,
        peer,
        truth,
        (1e-5, 1e-5, float(grad_tolerance(backend)[dtype] * truth[2].abs().max())),
        strict=True,
    ):
        assert_error_rule(got, want, true, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 127, 8192])
def test_row_counts(backend, num_rows):
    if backend == "triton" and num_rows == 8192:
        pytest.skip("the interpreter takes 20 ms a row; the GPU tests run this size")
    vocab_size = 33 if backend == "triton" else 1000
    logits = torch.randn(num_rows, vocab_size)
    token_ids = torch.randint(0, vocab_size, (num_rows,))
    g = torch.randn(num_rows)
    expected = with_gradient(lambda x: plain(x, token_ids), logits, g, g)
    with fk.use_backend(backend):
        mine = with_gradient(ours(token_ids), logits, g, g)
    for got, want in zip(mine, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def hostile_rows(vocab_size=1280):
    rows = torch.randn(6, vocab_size)
    rows[0, ::2] = -torch.inf  # entropy: 0 * -inf
    rows[1, :1100] = -torch.inf  # a first block of nothing but -inf
    rows[2] = rows[2] * 0.01 - 120  # all near -120: a maximum that starts at 0 gives NaN
    rows[3] += 1e4  # log-sum-exp loses the small digits
    rows[4] *= 1e4  # one token has all the mass
    rows[5] = 3e38 * rows[5].sign()
    return rows, torch.tensor([1, 1200, 7, 9, 11, 13])


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_equal_bits(backend):
    logits, token_ids = torch.randn(7, 4099).bfloat16(), torch.randint(0, 4099, (7,))
    g = torch.randn(7)
    with fk.use_backend(backend):
        first, second = (with_gradient(ours(token_ids), logits, g, g) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_rows(backend, dtype):
    logits, token_ids = hostile_rows()
    logits = logits.to(dtype)
    g, h = torch.randn(6), torch.randn(6)
    truth = with_gradient(lambda x: plain(x, token_ids), logits.double(), g.double(), h.double())
    peer = with_gradient(lambda x: plain(x, token_ids), logits.float(), g, h)
    with fk.use_backend(backend):
        mine = with_gradient(ours(token_ids), logits, g, h)
    # Row 5 overflows float32 in PyTorch's subtraction as in ours: only NaN is ruled out there.
    for got, want, true in zip(mine, peer, truth, strict=True):
        assert not got.isnan().any()
        tolerance = 4e-3 if got.dtype == torch.bfloat16 else 3e-6
        assert_error_rule(got[:5], want[:5], true[:5], tolerance * max(1.0, g.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_of_probability_zero(backend):
    logits = torch.zeros(1, 40)
    logits[0, 3] = -torch.inf
    with fk.use_backend(backend):
        logprobs, entropy, gradient = with_gradient(
            ours(torch.tensor([3])), logits, torch.ones(1), torch.ones(1)
        )
    assert logprobs.item() == -torch.inf
    assert entropy.item() == pytest.approx(torch.tensor(39.0).log().item(), rel=1e-6)
    assert gradient.isfinite().all()
    assert gradient[0, 3].item() == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_positive_infinity_are_not_hidden(backend, bad):
    logits = torch.zeros(2, 100)
    logits[0, 50] = bad
    with fk.use_backend(backend):
        logprobs, entropy = fk.token_logprobs(
            logits, torch.zeros(2, dtype=torch.long), return_entropy=True
        )
    assert logprobs[0].isnan()
    assert entropy[0].isnan()
    assert logprobs[1].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_leak_nothing(backend):
    logits = torch.randn(4, 5, 50)
    token_ids = torch.randint(0, 50, (4, 5))
    mask = torch.rand(4, 5) > 0.4
    expected = fk.token_logprobs(logits, token_ids)
    logits = torch.where(mask.unsqueeze(-1), logits, torch.nan).requires_grad_()
    token_ids = torch.where(mask, token_ids, -100)
    with fk.use_backend(backend):
        logprobs, entropy = fk.token_logprobs(
            logits, token_ids, loss_mask=mask, return_entropy=True
        )
        weights = torch.where(mask, torch.randn(4, 5), torch.nan)
        torch.autograd.backward([logprobs, entropy], [weights, weights])
    torch.testing.assert_close(logprobs[mask], expected[mask])
    assert (logprobs[~mask] == 0).all()
    assert (entropy[~mask] == 0).all()
    assert (logits.grad[~mask] == 0).all()
    assert logits.grad[mask].isfinite().all()
    assert (logits.grad[mask] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_masked(backend):
    logits = torch.full((3, 9), torch.nan, requires_grad=True)
    with fk.use_backend(backend):
        loss = fk.token_logprobs(
            logits, torch.full((3,), 99), loss_mask=torch.zeros(3, dtype=torch.bool)
        ).sum()
        loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


STRIDES = {
    "columns": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "wide rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row many times": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(backend, layout):
    logits = STRIDES[layout](torch.randn(6, 37))
    token_ids = torch.stack([torch.randint(0, 37, (6,)), torch.zeros(6, dtype=torch.long)], 1)[:, 0]
    g = torch.randn(12)[::2]
    expected = with_gradient(lambda x: plain(x, token_ids), logits.contiguous(), g, g)
    with fk.use_backend(backend):
        leaf = logits.detach().requires_grad_()
        logprobs, entropy = fk.token_logprobs(leaf, token_ids, return_entropy=True)
        (gradient,) = torch.autograd.grad([logprobs, entropy], [leaf], [g, g])
    for got, want in zip((logprobs, entropy, gradient), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_slice_of_a_batch(backend):
    """logits[:, :-1] with tokens[:, 1:], the slice every trainer takes."""
    logits, tokens = torch.randn(3, 6, 20), torch.randint(0, 20, (3, 6))
    with fk.use_backend(backend):
        got = fk.token_logprobs(logits[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(got, plain(logits[:, :-1], tokens[:, 1:])[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others_or_on_threads(backend):
    logits, token_ids = torch.randn(64, 8000), torch.randint(0, 8000, (64,))
    threads = torch.get_num_threads()
    with fk.use_backend(backend):
        whole = fk.token_logprobs(logits, token_ids, return_entropy=True)
        try:
            torch.set_num_threads(1)
            single = fk.token_logprobs(logits, token_ids, return_entropy=True)
        finally:
            torch.set_num_threads(threads)
        alone = fk.token_logprobs(logits[17:18], token_ids[17:18], return_entropy=True)
    for a, b, c in zip(whole, single, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[17:18], c)


@pytest.mark.skipif("native" not in BACKENDS, reason="native kernels are not built")
def test_switching_between_forward_and_backward():
    logits, token_ids = torch.randn(5, 301), torch.randint(0, 301, (5,))
    gradients = []
    for first, second in [("reference", "native"), ("native", "reference")]:
        leaf = logits.clone().requires_grad_()
        with fk.use_backend(first):
            logprobs, entropy = fk.token_logprobs(leaf, token_ids, return_entropy=True)
        with fk.use_backend(second):
            (logprobs.sum() + 2 * entropy.sum()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)])
def test_gradcheck(temperature):
    logits = torch.randn(3, 6, dtype=torch.float64)
    logits[0, 2] = -50.0
    token_ids = torch.tensor([0, 5, 2])
    mask = torch.tensor([True, False, True])
    torch.autograd.gradcheck(
        lambda x: fk.token_logprobs(
            x, token_ids, temperature=temperature, loss_mask=mask, return_entropy=True
        ),
        (logits.requires_grad_(),),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    logits, token_ids = torch.randn(3, 7, requires_grad=True), torch.tensor([0, 3, 6])
    mask, temperatures = torch.tensor([True, False, True]), torch.tensor([0.5, 1.0, 2.0])
    with fk.use_backend(backend):
        opcheck("token_logprobs", logits, token_ids, temperatures, 1.0, 3.0, mask, True)
        opcheck("token_logprobs", logits, token_ids, None, 0.7, 0.0, None, False)
        _, entropy, stats = torch.ops.fuserl_kernels.token_logprobs(
            logits.detach(), token_ids, None, 0.7, 0.0, mask, True
        )
        rest = (token_ids, None, 0.7, 0.0, mask, stats, entropy, torch.randn(3), torch.randn(3))
        opcheck("token_logprobs_bwd", logits.detach(), *rest)
        opcheck("token_logprobs_bwd_", logits.detach().clone(), *rest)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_grad_writes_into_the_logits(backend, dtype):
    leaf = torch.randn(2, 4, 50).to(dtype).requires_grad_()
    token_ids, mask = torch.randint(0, 50, (2, 4)), torch.rand(2, 4) > 0.3
    with fk.use_backend(backend):
        kept = fk.token_logprobs(leaf * 2, token_ids, loss_mask=mask, return_entropy=True)
        (expected,) = torch.autograd.grad(kept[0].sum() + kept[1].sum(), leaf)
        logits = leaf * 2
        seen = []
        logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
        logprobs, entropy = fk.token_logprobs(
            logits, token_ids, loss_mask=mask, return_entropy=True, inplace_grad=True
        )
        loss = logprobs.sum() + entropy.sum()
        loss.backward(retain_graph=True)
        assert torch.equal(leaf.grad, expected)
        assert seen == [logits.data_ptr()]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_inplace_grad_refuses_what_it_cannot_overwrite():
    token_ids = torch.zeros(2, 3, dtype=torch.long)
    leaf = torch.randn(2, 4, 5, requires_grad=True)
    with pytest.raises(ValueError, match="logits must be the output of an op"):
        fk.token_logprobs(leaf, torch.zeros(2, 4, dtype=torch.long), inplace_grad=True)
    with pytest.raises(ValueError, match=r"logits must be viewable as \[N, V\]"):
        fk.token_logprobs((leaf * 1)[:, :-1], token_ids, inplace_grad=True)


def test_compiles_whole_and_follows_a_switch():
    token_ids = torch.randint(0, 21, (4,))
    leaf = torch.randn(4, 21, requires_grad=True)

    def function(x, inplace):
        logprobs, entropy = fk.token_logprobs(
            x * 2, token_ids, temperature=0.7, return_entropy=True, inplace_grad=inplace
        )
        return (logprobs + 0.1 * entropy).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(leaf, False), leaf)
    for backend in BACKENDS:
        for inplace in (False, True):
            with fk.use_backend(backend):
                (got,) = torch.autograd.grad(compiled(leaf, inplace), leaf)
            torch.testing.assert_close(got, expected)


def test_no_gradient_is_made_where_none_is_wanted():
    logits = torch.randn(2, 5, requires_grad=True)
    with torch.no_grad():
        assert not fk.token_logprobs(logits, torch.tensor([0, 1])).requires_grad
    assert not fk.token_logprobs(logits.detach(), torch.tensor([0, 1])).requires_grad


BAD = {
    "logits": {"logits": torch.zeros(2, 5, dtype=torch.long)},
    "token_ids must be an integer": {"token_ids": torch.zeros(2)},
    "token_ids must have shape": {"token_ids": torch.zeros(3, dtype=torch.long)},
    r"token_ids must be in \[0, 5\) where trained, found 5": {"token_ids": torch.tensor([0, 5])},
    r"token_ids .* found -100": {"token_ids": torch.tensor([-100, 0])},
    "temperature must be a finite number above 0.*-1": {"temperature": -1.0},
    "temperature .*nan": {"temperature": float("nan")},
    "temperature must be above 0, found 0": {"temperature": torch.tensor([1.0, 0.0])},
    "temperature must have shape": {"temperature": torch.ones(3)},
    "loss_mask must be a bool": {"loss_mask": torch.ones(2)},
    "loss_mask must have shape": {"loss_mask": torch.ones(3, dtype=torch.bool)},
    "token_ids must be on": {"token_ids": torch.zeros(2, dtype=torch.long, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(backend, message):
    arguments = {"logits": torch.zeros(2, 5), "token_ids": torch.tensor([0, 1])} | BAD[message]
    with fk.use_backend(backend), pytest.raises(ValueError, match=message):
        fk.token_logprobs(**arguments)


@pytest.mark.skipif("native" not in BACKENDS, reason="native kernels are not built")
def test_the_native_module_reports_its_build():
    info = native.module().build_info()
    assert info["instructions"] in ("avx512", "avx2", "baseline")
    assert info["compiler"]


def test_inplace_grad_refuses_memory_that_must_not_be_written():
    leaf, token_ids = torch.randn(4, 7, requires_grad=True), torch.randint(0, 7, (4,))
    row = torch.randn(1, 7, requires_grad=True)
    long = torch.randn(40, requires_grad=True)
    for logits, message in [
        (leaf, "not a leaf or a view of one"),
        (leaf.view(4, 7), "not a leaf or a view of one"),
        ((row * 1).expand(4, 7), "overlap themselves"),
        ((long * 1).as_strided((4, 7), (3, 1)), "overlap themselves"),
        ((leaf * 1).t().reshape(7, 4).t(), None),  # columns far apart, none shared
        ((leaf * 1)[:1], None),
    ]:
        ids = token_ids[: logits.shape[0]]
        if message is None:
            fk.token_logprobs(logits, ids, inplace_grad=True).sum().backward()
            continue
        with pytest.raises(ValueError, match=message):
            fk.token_logprobs(logits, ids, inplace_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_differentiable_twice(backend):
    logits = torch.randn(4, 7, requires_grad=True)
    with fk.use_backend(backend):
        logprobs = fk.token_logprobs(logits, torch.randint(0, 7, (4,)))
        (gradient,) = torch.autograd.grad(logprobs.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan"), 1e31])
def test_softcap_out_of_range(bad):
    with pytest.raises(ValueError, match="softcap must be above 0 and at most 1e30"):
        fk.token_logprobs(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), softcap=bad)

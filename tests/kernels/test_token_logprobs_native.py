"""The native rows: every instruction set, threads, half precision, softcap, bf16 over logits."""

import pytest
import torch
from kernel_testing import assert_error_rule

from fuserl_kernels import native
from fuserl_kernels.token_logprobs import backward_native, forward_native

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)

GRAD_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def formula(logits, token_ids, temperature, softcap, g, h):
    """Logprobs, entropy and gradient through PyTorch's autograd, in the dtype of logits."""
    leaf = logits.clone().requires_grad_()
    x = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    logp = torch.log_softmax(x / temperature, -1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    chosen = logp.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    (chosen * g + entropy * h).sum().backward()
    return chosen.detach(), entropy.detach(), leaf.grad


def rows(logits, token_ids, temperature, softcap, g, h, mask=None, out=None):
    """The same from the native rows."""
    numbers = (None, temperature, softcap, mask)
    logprobs, entropy, stats = forward_native(logits, token_ids, *numbers, True)
    gradient = backward_native(logits, token_ids, *numbers, stats, entropy, g, h, out)
    return logprobs, entropy, gradient


def problem(num_rows, vocab_size, dtype=torch.float32, scale=4.0):
    logits = (torch.randn(num_rows, vocab_size) * scale).to(dtype)
    token_ids = torch.randint(0, vocab_size, (num_rows,))
    return logits, token_ids, torch.randn(num_rows), torch.randn(num_rows)


def test_an_instruction_set_runs_once_chosen(instructions):
    assert native.module().build_info()["instructions"] == instructions


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="no instruction set named mmx"):
        native.module().set_instruction_set("mmx")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 1280, 5003, 151936])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, 0.0), (0.7, 0.0), (1.3, 30.0)])
def test_error_is_no_more_than_pytorch_makes(instructions, dtype, vocab_size, temperature, softcap):
    logits, token_ids, g, h = problem(3, vocab_size, dtype)
    truth = formula(logits.double(), token_ids, temperature, softcap, g.double(), h.double())
    peer = formula(logits.float(), token_ids, temperature, softcap, g, h)
    mine = rows(logits, token_ids, temperature, softcap, g, h)
    assert mine[2].dtype == dtype
    assert_error_rule(mine[0], peer[0], truth[0], 2e-6)
    assert_error_rule(mine[1], peer[1], truth[1], 5e-6)
    assert_error_rule(mine[2], peer[2], truth[2], GRAD_TOLERANCE[dtype] * truth[2].abs().max())


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(instructions, temperature):
    problem_ = problem(4, 3000)
    logits, token_ids, g, h = problem_
    truth = formula(logits.double(), token_ids, temperature, 0.0, g.double(), h.double())
    peer = formula(logits, token_ids, temperature, 0.0, g, h)
    mine = rows(logits, token_ids, temperature, 0.0, g, h)
    for got, want, true in zip(mine, peer, truth, strict=True):
        assert_error_rule(got, want, true, 2e-6 * max(1.0, true.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_rows(instructions, dtype):
    """Blocks of nothing but -inf, a maximum that grows block by block, and huge logits."""
    logits, token_ids, g, h = problem(7, 9000, dtype)
    logits[0, :5000] = -torch.inf
    logits[1, 100:] = -torch.inf
    logits[2] = torch.linspace(-500, 500, 9000)
    logits[3] = logits[3] * 0.01 - 120
    logits[4] += 1e4
    logits[5] = torch.where(torch.arange(9000) == token_ids[5], 1e38, -3e38)
    logits[6, 1::2] = -torch.inf
    token_ids[:2] = torch.tensor([8999, 3])
    truth = formula(logits.double(), token_ids, 1.0, 0.0, g.double(), h.double())
    peer = formula(logits.float(), token_ids, 1.0, 0.0, g, h)
    mine = rows(logits, token_ids, 1.0, 0.0, g, h)
    for got, want, true in zip(mine, peer, truth, strict=True):
        tolerance = 4e-3 if got.dtype == torch.bfloat16 else 3e-6
        assert_error_rule(got, want, true, tolerance * max(1.0, g.abs().max()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda row: row.fill_(-torch.inf),
        lambda row: row[7:8].fill_(torch.nan),
        lambda row: row[4500:4501].fill_(torch.nan),
        lambda row: row[4500:4501].fill_(torch.inf),
    ],
    ids=["all -inf", "early nan", "late nan", "inf"],
)
def test_a_row_without_a_softmax_is_nan_and_alone(instructions, spoil):
    logits, token_ids, g, h = problem(3, 5000)
    spoil(logits[1])
    logprobs, entropy, gradient = rows(logits, token_ids, 1.0, 0.0, g, h)
    for result in (logprobs, entropy, gradient):
        assert result[1].isnan().all()
        assert result[::2].isfinite().all()


@pytest.mark.parametrize("token_id", [-1, 5000])
def test_a_token_outside_the_vocabulary_gives_nan(instructions, token_id):
    logits, token_ids, g, h = problem(3, 5000)
    token_ids[1] = token_id
    logprobs, entropy, gradient = rows(logits, token_ids, 1.0, 0.0, g, h)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert entropy.isfinite().all()
    assert gradient[1].isnan().all()
    assert gradient[::2].isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_masked_row_is_zero_whatever_it_holds(instructions, softcap):
    logits, token_ids, g, h = problem(4, 1003)
    expected = rows(logits, token_ids, 0.7, softcap, g, h)
    mask = torch.tensor([True, False, True, False])
    logits[~mask], token_ids[~mask], g[~mask] = torch.nan, -5, torch.nan
    for got, want in zip(rows(logits, token_ids, 0.7, softcap, g, h, mask), expected, strict=True):
        assert torch.equal(got[mask], want[mask])
        assert (got[~mask] == 0).all()


def test_softcap_of_infinities(instructions):
    """tanh takes them to +-1, so a capped row of them has a softmax."""
    logits = torch.tensor([[torch.inf, -torch.inf, 0.0], [torch.nan, 1.0, 2.0]])
    one = torch.ones(2)
    logprobs, _, gradient = rows(logits, torch.tensor([0, 1]), 1.0, 2.0, one, 0 * one)
    want = torch.log_softmax(torch.tensor([2.0, -2.0, 0.0]), -1)[0]
    torch.testing.assert_close(logprobs[0], want)
    assert gradient[0, :2].tolist() == [0, 0]
    assert logprobs[1].isnan()


@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_bf16_gradient_over_the_storage_of_float32_logits(instructions, softcap):
    """Rows keep their addresses; nothing unread is overwritten, nothing past the result touched."""
    logits, token_ids, g, h = problem(5, 5003)
    mask = torch.tensor([True, True, False, True, True])
    apart = torch.empty(5, 5003, dtype=torch.bfloat16)
    rows(logits, token_ids, 0.7, softcap, g, h, mask, apart)
    exact = rows(logits, token_ids, 0.7, softcap, g, h, mask)[2]
    assert torch.equal(apart, exact.bfloat16())
    storage = logits.clone()
    over = storage.view(torch.bfloat16)[:, :5003]
    assert rows(storage, token_ids, 0.7, softcap, g, h, mask, over)[2] is over
    assert torch.equal(over, apart)
    before = logits.view(torch.bfloat16)[:, 5003:].view(torch.int16)
    assert torch.equal(storage.view(torch.bfloat16)[:, 5003:].view(torch.int16), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_in_place_has_the_same_bits(instructions, dtype):
    logits, token_ids, g, h = problem(3, 5003, dtype)
    apart = rows(logits, token_ids, 1.0, 0.0, g, h)[2]
    assert rows(logits, token_ids, 1.0, 0.0, g, h, out=logits)[2] is logits
    assert torch.equal(logits, apart)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_round_to_nearest_even(instructions, dtype):
    """Against PyTorch's rounding of the float32 gradient, from 1e30 down to the subnormals."""
    logits, token_ids, _, _ = problem(64, 1000, dtype, scale=8.0)
    g = torch.logspace(-12, 30 if dtype == torch.bfloat16 else 7, 64)
    zero = torch.zeros(64)
    exact = rows(logits.float(), token_ids, 1.0, 0.0, g, zero)[2]
    half = rows(logits, token_ids, 1.0, 0.0, g, zero)[2]
    assert torch.equal(half, exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_and_neighbours_change_no_bit(instructions, dtype):
    logits, token_ids, g, h = problem(37, 40013, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            results.append(rows(logits, token_ids, 0.7, 0.0, g, h))
    finally:
        torch.set_num_threads(threads)
    alone = rows(logits[17:18], token_ids[17:18], 0.7, 0.0, g[17:18], h[17:18])
    for first, *others, single in zip(*results, alone, strict=True):
        assert all(torch.equal(first, other) for other in others)
        assert torch.equal(first[17:18], single)


def test_a_gradient_dtype_without_an_implementation_is_refused():
    logits, token_ids, g, h = problem(2, 5)
    with pytest.raises(ValueError, match="out must have the dtype of logits"):
        rows(logits, token_ids, 1.0, 0.0, g, h, out=logits.half())

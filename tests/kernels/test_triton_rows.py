"""The Triton row kernels of token_logprobs, in the interpreter or on a GPU."""

from importlib import import_module

import pytest
import torch
from kernel_testing import assert_error_rule

from fuserl_kernels import triton_runtime
from fuserl_kernels.reference.logprobs import token_logprobs_bwd, token_logprobs_fwd

pytestmark = pytest.mark.skipif(
    triton_runtime.why_absent() is not None, reason="Triton cannot run here"
)
rows = import_module("fuserl_kernels.token_logprobs")
DEVICE = triton_runtime.device_type()
STEP = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def example(num_rows, vocab_size, dtype=torch.float32, scale=4.0):
    logits = (torch.randn(num_rows, vocab_size, device=DEVICE) * scale).to(dtype)
    token_ids = torch.randint(0, vocab_size, (num_rows,), device=DEVICE)
    temperatures = torch.rand(num_rows, device=DEVICE) + 0.5
    return logits, token_ids, temperatures


def forward_and_backward(forward, backward, logits, token_ids, temperatures, softcap, mask, g, h):
    logprobs, entropy, stats = forward(
        logits, token_ids, temperatures, 1.0, softcap, mask, h is not None
    )
    gradient = backward(logits, token_ids, temperatures, 1.0, softcap, mask, stats, entropy, g, h)
    return logprobs, entropy, stats, gradient


def check_against_truth(logits, token_ids, temperatures, softcap=0.0, mask=None):
    g, h = torch.randn(2, logits.shape[0], device=DEVICE)
    rest = (token_ids, temperatures, softcap, mask, g, h)
    reference = (token_logprobs_fwd, token_logprobs_bwd)
    truth = forward_and_backward(*reference, logits.double(), *rest)
    peer = forward_and_backward(*reference, logits.float(), *rest)
    ours = forward_and_backward(rows.forward_triton, rows.backward_triton, logits, *rest)
    for mine, other, true in zip(ours[:3], peer, truth, strict=False):
        assert mine.dtype == torch.float32
        assert_error_rule(mine, other, true, 2e-6 * max(1.0, softcap / 5))
    assert ours[3].dtype == logits.dtype
    largest = max(1e-3, float(truth[3].abs().max()))
    assert_error_rule(ours[3], peer[3], truth[3], STEP[logits.dtype] * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 1280, 2048, 8192, 20011])
def test_error_is_no_more_than_pytorch_makes(dtype, softcap, vocab_size):
    mask = torch.tensor([True, False, True], device=DEVICE)
    check_against_truth(*example(3, vocab_size, dtype), softcap, mask)


def test_a_whole_vocabulary():
    check_against_truth(*example(2, 128256, torch.bfloat16))


def test_without_entropy_the_logprob_has_the_same_bits():
    logits, token_ids, temperatures = example(3, 9000)
    with_it = rows.forward_triton(logits, token_ids, temperatures, 1.0, 0.0, None, True)
    without = rows.forward_triton(logits, token_ids, temperatures, 1.0, 0.0, None, False)
    assert torch.equal(with_it[0], without[0])
    assert without[1].shape == (0,)


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_row_counts(num_rows):
    logits, token_ids, _ = example(num_rows, 33)
    logprobs, entropy, stats = rows.forward_triton(logits, token_ids, None, 0.7, 0.0, None, True)
    assert logprobs.shape == entropy.shape == (num_rows,)
    assert stats.shape == (2, num_rows)
    g = torch.ones(num_rows, device=DEVICE)
    gradient = rows.backward_triton(
        logits, token_ids, None, 0.7, 0.0, None, stats, entropy, g, None
    )
    expected = token_logprobs_fwd(logits, token_ids, None, 0.7, 0.0, None, True)
    torch.testing.assert_close(logprobs, expected[0])
    assert gradient.shape == logits.shape


def hostile_rows(vocab_size=10000):
    logits = torch.randn(6, vocab_size, device=DEVICE)
    logits[0, ::2] = -torch.inf  # entropy: 0 * -inf
    logits[1, 100:] = -torch.inf  # whole blocks of nothing but -inf, in the order of the walk
    logits[2, :9900] = -torch.inf  # and at the other end
    logits[3] = logits[3] * 0.01 - 120  # a maximum that starts at 0 gives NaN
    logits[4] += 1e4  # log-sum-exp loses the small digits
    logits[5] *= 1e4  # one token has all the mass
    return logits, torch.tensor([1, 50, 9950, 9, 11, 13], device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_rows(dtype):
    logits, token_ids = hostile_rows()
    check_against_truth(logits.to(dtype), token_ids, torch.ones(6, device=DEVICE))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_positive_infinity_are_not_hidden(bad):
    logits, token_ids, temperatures = example(2, 9000)
    token_ids[0] = 3
    logits[0, 5000] = bad
    results = forward_and_backward(
        rows.forward_triton,
        rows.backward_triton,
        *(logits, token_ids, temperatures, 0.0, None),
        *torch.ones(2, 2, device=DEVICE),
    )
    logprobs, entropy, _, gradient = results
    assert logprobs[0].isnan()
    assert entropy[0].isnan()
    assert gradient[0].isnan().any()
    assert logprobs[1].isfinite()
    assert gradient[1].isfinite().all()


def test_a_row_of_minus_infinity_is_nan():
    logits = torch.full((1, 9000), -torch.inf, device=DEVICE)
    token_ids = torch.zeros(1, dtype=torch.long, device=DEVICE)
    logprobs, entropy, _ = rows.forward_triton(logits, token_ids, None, 1.0, 0.0, None, True)
    assert logprobs.isnan().all()
    assert entropy.isnan().all()


def test_masked_rows_are_never_read_and_give_zeros():
    logits, token_ids, temperatures = example(3, 5000)
    mask = torch.tensor([True, False, True], device=DEVICE)
    logits[1], token_ids[1], temperatures[1] = torch.nan, -100, torch.nan
    g = torch.tensor([1.0, torch.nan, 1.0], device=DEVICE)
    results = forward_and_backward(
        rows.forward_triton,
        rows.backward_triton,
        *(logits, token_ids, temperatures, 0.0, mask, g, g),
    )
    for result in results:
        row = result[:, 1] if result is results[2] else result[1]
        assert (row == 0).all()
        assert result.isfinite().all()


@pytest.mark.parametrize("token_id", [-1, 700, 2**40])
def test_a_token_outside_the_vocabulary_gives_nan(token_id):
    logits, token_ids, temperatures = example(2, 700)
    token_ids[0] = token_id
    results = forward_and_backward(
        rows.forward_triton,
        rows.backward_triton,
        *(logits, token_ids, temperatures, 0.0, None),
        *torch.ones(2, 2, device=DEVICE),
    )
    assert results[0][0].isnan()
    assert results[1].isfinite().all()
    assert results[3][0].isnan().all()
    assert results[3][1].isfinite().all()


LAYOUTS = {
    "columns": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "wide rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "one row many times": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_input_and_output(layout):
    logits, token_ids, temperatures = example(3, 2100)
    logits = LAYOUTS[layout](logits)
    g = torch.randn(6, device=DEVICE)[::2]
    kernels = (rows.forward_triton, rows.backward_triton)
    rest = (token_ids, temperatures, 0.0, None, g, g)
    expected = forward_and_backward(*kernels, logits.contiguous(), *rest)
    got = forward_and_backward(*kernels, logits, *rest)
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine, other)
    out = torch.full((2100, 6), torch.nan, device=DEVICE).t()[::2]
    written = rows.backward_triton(
        logits, token_ids, temperatures, 1.0, 0.0, None, got[2], got[1], g, g, out
    )
    assert written is out
    assert torch.equal(out, expected[3])


@pytest.mark.parametrize("vocab_size", [70, 4096, 9001])
def test_the_gradient_may_lie_over_the_logits(vocab_size):
    logits, token_ids, temperatures = example(3, vocab_size)
    g, h = torch.randn(2, 3, device=DEVICE)
    rest = (token_ids, temperatures, 1.0, 0.0, None)
    logprobs, entropy, stats = rows.forward_triton(logits, *rest, True)
    assert logprobs.isfinite().all()
    rest = (*rest, stats, entropy, g, h)
    expected = rows.backward_triton(logits, *rest)
    narrow = torch.empty(3, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    rows.backward_triton(logits, *rest, narrow)
    same = logits.clone()
    rows.backward_triton(same, *rest, same)
    assert torch.equal(same, expected)
    wide = logits.clone()
    overlay = wide.view(torch.bfloat16)[:, :vocab_size]
    assert overlay.data_ptr() == wide.data_ptr()
    rows.backward_triton(wide, *rest, overlay)
    assert torch.equal(overlay, narrow)
    torch.testing.assert_close(narrow.float(), expected, rtol=8e-3, atol=1e-8)


def test_a_row_does_not_depend_on_its_batch_and_bits_repeat():
    logits, token_ids, temperatures = example(5, 9000)
    g = torch.randn(5, device=DEVICE)
    kernels = (rows.forward_triton, rows.backward_triton)
    whole = forward_and_backward(*kernels, logits, token_ids, temperatures, 0.0, None, g, g)
    again = forward_and_backward(*kernels, logits, token_ids, temperatures, 0.0, None, g, g)
    one = slice(3, 4)
    alone = forward_and_backward(
        *kernels, logits[one], token_ids[one], temperatures[one], 0.0, None, g[one], g[one]
    )
    for first, second, single in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[:, one] if first is whole[2] else first[one], single)


@pytest.mark.parametrize("vocab_size", [3000, 128256])
@pytest.mark.gpu
@pytest.mark.covers("token_logprobs")
def test_bits_are_equal_in_every_configuration(vocab_size, monkeypatch):
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        logits, token_ids, temperatures = example(300, vocab_size, dtype)
        results = []
        for configuration in rows.FWD_CONFIGURATIONS[size]:
            monkeypatch.setitem(rows.FWD_CONFIGURATIONS, size, [configuration])
            results.append(
                rows.forward_triton(logits, token_ids, temperatures, 1.0, 0.0, None, True)
            )
        for result in results[1:]:
            for mine, first in zip(result, results[0], strict=True):
                assert torch.equal(mine, first)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.covers("token_logprobs")
def test_more_than_2_to_the_31_logits():
    vocab_size, num_rows = 151936, 14200
    logits = torch.randn(num_rows, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    token_ids = torch.randint(0, vocab_size, (num_rows,), device=DEVICE)
    logprobs, entropy, stats = rows.forward_triton(logits, token_ids, None, 1.0, 0.0, None, True)
    last = slice(num_rows - 8, num_rows)
    expected = token_logprobs_fwd(logits[last].float(), token_ids[last], None, 1.0, 0.0, None, True)
    torch.testing.assert_close(logprobs[last], expected[0], atol=5e-6, rtol=1e-6)
    g = torch.ones(num_rows, device=DEVICE)
    alone = rows.backward_triton(
        logits[last], token_ids[last], None, 1.0, 0.0, None, stats[:, last], entropy[last],
        g[last], None,
    )  # fmt: skip
    rows.backward_triton(logits, token_ids, None, 1.0, 0.0, None, stats, entropy, g, None, logits)
    assert torch.equal(logits[last], alone)

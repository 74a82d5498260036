"""The fused linear forward: hidden x weight to log-probability, entropy and statistics."""

from importlib import import_module

import pytest
import torch
from kernel_testing import assert_error_rule

from fuserl_kernels import triton_runtime
from fuserl_kernels.reference.logprobs import token_logprobs_fwd

pytestmark = [
    pytest.mark.skipif(triton_runtime.why_absent() is not None, reason="Triton cannot run here"),
    # Padding rows and tiles are computed and dropped; the interpreter's NumPy speaks of them.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
linear = import_module("fuserl_kernels.triton_linear_logprobs")
DEVICE = triton_runtime.device_type()


def example(num_rows, vocab_size, hidden_size, dtype):
    hidden = torch.randn(num_rows, hidden_size, device=DEVICE).to(dtype)
    weight = (torch.randn(vocab_size, hidden_size, device=DEVICE) * 0.5).to(dtype)
    bias = torch.randn(vocab_size, device=DEVICE).to(dtype)
    token_ids = torch.randint(0, vocab_size, (num_rows,), device=DEVICE)
    temperatures = torch.rand(num_rows, device=DEVICE) + 0.5
    return hidden, weight, bias, token_ids, temperatures


def expected(hidden, weight, bias, token_ids, temperatures, softcap, return_entropy):
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    return token_logprobs_fwd(logits, token_ids, temperatures, 1.0, softcap, None, return_entropy)


def cast(dtype, *tensors):
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "hidden_size", "dtype", "has_bias", "softcap"),
    [
        (1, 1, 8, torch.bfloat16, False, 0.0),
        (3, 2, 7, torch.float32, True, 0.0),
        (3, 1000, 33, torch.float32, True, 9.0),
        (130, 1280, 65, torch.bfloat16, True, 0.0),  # rows the copy engine cannot describe
        (5, 1000, 64, torch.bfloat16, True, 9.0),
        (140, 700, 128, torch.float16, False, 0.0),
        (3, 20000, 16, torch.bfloat16, False, 0.0),  # more tiles than are merged side by side
    ],
)
def test_error_is_no_more_than_pytorch_makes(
    num_rows, vocab_size, hidden_size, dtype, has_bias, softcap
):
    hidden, weight, bias, *rest = example(num_rows, vocab_size, hidden_size, dtype)
    matrices = (hidden, weight, bias if has_bias else None)
    truth = expected(*cast(torch.float64, *matrices), *rest, softcap, True)
    peer = expected(*cast(torch.float32, *matrices), *rest, softcap, True)
    ours = linear.linear_forward_triton(*matrices, *rest, 1.0, softcap, True)
    for mine, other, true in zip(ours, peer, truth, strict=True):
        assert mine.dtype == torch.float32
        assert_error_rule(mine, other, true, 4e-6)


def test_every_configuration_agrees():
    arguments = example(150, 900, 72, torch.bfloat16)
    truth = expected(*cast(torch.float64, *arguments[:3]), *arguments[3:], 0.0, True)
    configurations = [c for choices in linear.LINEAR_CONFIGURATIONS.values() for c in choices]
    if triton_runtime.INTERPRETING:
        configurations += linear.SPECIALIZED.values()
    for configuration in configurations:
        ours = linear.linear_forward_triton(*arguments, 1.0, 0.0, True, configuration)
        for mine, true in zip(ours, truth, strict=True):
            torch.testing.assert_close(mine.double(), true, atol=2e-5, rtol=1e-5)


def test_without_entropy_and_with_strides():
    hidden, weight, bias, token_ids, temperatures = example(4, 300, 32, torch.bfloat16)
    rest = (bias, token_ids, temperatures, 1.0, 0.0)
    whole = linear.linear_forward_triton(hidden, weight, *rest, True)
    logprobs, entropy, stats = linear.linear_forward_triton(
        hidden.t().contiguous().t(), weight.repeat_interleave(2, 0)[::2], *rest, False
    )
    assert entropy.shape == (0,)
    torch.testing.assert_close(logprobs, whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats, whole[2], atol=1e-5, rtol=1e-5)


def test_a_row_does_not_depend_on_its_batch():
    hidden, weight, bias, token_ids, temperatures = example(150, 1000, 64, torch.bfloat16)
    one = slice(140, 141)
    whole = linear.linear_forward_triton(
        hidden, weight, bias, token_ids, temperatures, 1.0, 0.0, True
    )
    alone = linear.linear_forward_triton(
        hidden[one], weight, bias, token_ids[one], temperatures[one], 1.0, 0.0, True
    )
    assert torch.equal(whole[0][one], alone[0])
    assert torch.equal(whole[1][one], alone[1])
    assert torch.equal(whole[2][:, one], alone[2])


@pytest.mark.parametrize("token_id", [-1, 300, 511, 2**40])
def test_a_token_outside_the_vocabulary_gives_nan(token_id):
    hidden, weight, _, token_ids, _ = example(3, 300, 16, torch.bfloat16)
    token_ids[1] = token_id
    logprobs, entropy, _ = linear.linear_forward_triton(
        hidden, weight, None, token_ids, None, 0.7, 0.0, True
    )
    assert logprobs.isnan().tolist() == [False, True, False]
    assert entropy.isfinite().all()


def test_no_rows_and_two_dtypes():
    hidden, weight, _, token_ids, _ = example(2, 300, 16, torch.bfloat16)
    logprobs, entropy, stats = linear.linear_forward_triton(
        hidden[:0], weight, None, token_ids[:0], None, 1.0, 0.0, True
    )
    assert logprobs.shape == entropy.shape == (0,)
    assert stats.shape == (2, 0)
    with pytest.raises(ValueError, match="weight must have the dtype of hidden"):
        linear.linear_forward_triton(hidden, weight.float(), None, token_ids, None, 1.0, 0.0, True)

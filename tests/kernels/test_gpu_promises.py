"""What every op does on a real GPU besides being right: it repeats its bits, it waits for nothing
where it says so, and a graph holds it. Those of the RL ops, of rotary and of glu are beside their
values, in test_gpu_rl.py and test_gpu_decoder_rotary.py."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from gpu_testing import assert_replays, assert_waits_for_nothing, same

import fuserl_kernels as fk

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
NUM_ROWS, VOCAB_SIZE, HIDDEN_SIZE = 96, 32003, 256


class Call(NamedTuple):
    """inputs: what a step of training would change in place, floating point. run: the op, and its
    gradients where it has them. rows: the results that are one row each, and promise to be the
    same alone; 0 of them where nothing is promised."""

    inputs: list[torch.Tensor]
    run: Callable[..., tuple[torch.Tensor, ...]]
    rows: int = 0


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def with_gradients(function, *leaves):
    """Outputs, and the gradients of the sum of those that have one."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(x.float().square().sum() for x in outputs if x.requires_grad)
    return *(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)


def token_ids(num_rows: int) -> torch.Tensor:
    return (torch.arange(num_rows, device=DEVICE) * 7919) % VOCAB_SIZE


def token_logprobs(dtype: torch.dtype, inplace: bool) -> Call:
    def run(logits):
        def op(leaf):
            given = leaf * 1 if inplace else leaf
            return fk.token_logprobs(
                given, token_ids(len(leaf)), return_entropy=True, inplace_grad=inplace
            )

        return with_gradients(op, logits)

    return Call([2 * draw(NUM_ROWS, VOCAB_SIZE, dtype=dtype)], run, rows=3)


def linear_token_logprobs(dtype: torch.dtype) -> Call:
    """Without a mask and a gradient, whose rows the host must count."""
    weight = draw(VOCAB_SIZE, HIDDEN_SIZE, dtype=dtype) * HIDDEN_SIZE**-0.5

    def run(hidden):
        with torch.no_grad():
            ids = token_ids(len(hidden))
            return fk.linear_token_logprobs(hidden, weight, ids, return_entropy=True)

    return Call([draw(NUM_ROWS, HIDDEN_SIZE, dtype=dtype)], run, rows=2)


def norm(kind: str, width: int) -> Call:
    weight, bias = draw(width), draw(width)

    def op(x, residual):
        if kind == "rms":
            return fk.rms_norm(x, weight, residual=residual)
        return fk.layer_norm(x, weight, bias, residual=residual)

    return Call(
        [draw(NUM_ROWS, width), draw(NUM_ROWS, width)], lambda *x: with_gradients(op, *x), rows=4
    )


def fixed_linear() -> Call:
    weight, bias = draw(512, HIDDEN_SIZE), draw(512)
    return Call(
        [draw(NUM_ROWS, HIDDEN_SIZE)],
        lambda x: with_gradients(lambda leaf: fk.fixed_linear(leaf, weight, bias), x),
    )


def sampling(dtype: torch.dtype, **options: float) -> Call:
    def run(logits):
        rows = torch.arange(len(logits), device=DEVICE)
        return fk.sample_tokens(logits, seed=3, request_ids=rows, positions=rows * 5, **options)

    return Call([2 * draw(NUM_ROWS, VOCAB_SIZE, dtype=dtype)], run)


def attention(head_dim: int) -> Call:
    shape = (NUM_ROWS, 2, 300, head_dim)
    cache = [draw(*shape), draw(*shape)]
    lengths = torch.arange(NUM_ROWS, device=DEVICE) * 3
    return Call(
        [draw(NUM_ROWS, 6, head_dim), *cache],
        lambda query, keys, values: (fk.decode_attention(query, keys, values, lengths),),
    )


def token_losses(name: str) -> Call:
    mask = torch.arange(NUM_ROWS * 64, device=DEVICE).view(NUM_ROWS, 64) % 5 > 0
    old, other = draw(NUM_ROWS, 64, dtype=torch.float32), draw(NUM_ROWS, 64, dtype=torch.float32)

    def op(leaf):
        if name == "policy_loss":
            loss, metrics = fk.policy_loss(leaf, old, other, mask)
        else:
            loss, metrics = fk.value_loss(leaf, old, other, mask)
        return loss, *metrics.values()

    return Call([old + 0.1 * other], lambda leaf: with_gradients(op, leaf))


def moments() -> Call:
    x = draw(NUM_ROWS, 1001, dtype=torch.float32)
    mask = x > -0.5
    return Call([x], lambda x: (fk.masked_moments(x, mask),))


CALLS: dict[str, tuple[str, Callable[[], Call]]] = {
    "token_logprobs": ("token_logprobs", lambda: token_logprobs(torch.bfloat16, False)),
    "token_logprobs float32": ("token_logprobs", lambda: token_logprobs(torch.float32, False)),
    "token_logprobs float16": ("token_logprobs", lambda: token_logprobs(torch.float16, False)),
    "token_logprobs in place": ("token_logprobs", lambda: token_logprobs(torch.bfloat16, True)),
    "linear_token_logprobs": (
        "linear_token_logprobs",
        lambda: linear_token_logprobs(torch.bfloat16),
    ),
    "linear_token_logprobs float32": (
        "linear_token_logprobs",
        lambda: linear_token_logprobs(torch.float32),
    ),
    "rms_norm": ("rms_norm", lambda: norm("rms", 1024)),
    "rms_norm of odd rows": ("rms_norm", lambda: norm("rms", 1001)),
    "layer_norm": ("layer_norm", lambda: norm("layer", 1024)),
    "fixed_linear": ("fixed_linear", fixed_linear),
    "sample_tokens": ("sample_tokens", lambda: sampling(torch.bfloat16)),
    "sample_tokens greedy": (
        "sample_tokens",
        lambda: sampling(torch.float32, temperature=0.0),
    ),
    "sample_tokens truncated": (
        "sample_tokens",
        lambda: sampling(torch.float16, temperature=0.8, top_k=90, top_p=0.9, min_p=0.002),
    ),
    "decode_attention": ("decode_attention", lambda: attention(128)),
    "policy_loss": ("policy_loss", lambda: token_losses("policy_loss")),
    "value_loss": ("value_loss", lambda: token_losses("value_loss")),
    "masked_moments": ("masked_moments", moments),
}
EACH = [pytest.param(name, marks=pytest.mark.covers(op)) for name, (op, _) in CALLS.items()]


@pytest.mark.parametrize("name", EACH)
def test_repeats_its_bits_and_waits_for_nothing(name):
    call = CALLS[name][1]()
    first = [x.clone() for x in call.run(*call.inputs)]
    for a, b in zip(first, call.run(*call.inputs), strict=True):
        assert same(a, b)
    assert_waits_for_nothing(lambda: call.run(*call.inputs))


@pytest.mark.parametrize("name", EACH)
def test_inside_a_graph(name):
    call = CALLS[name][1]()

    def change():
        for x in call.inputs:
            x.mul_(0.9)

    assert_replays(lambda: call.run(*call.inputs), change)


ROWS = [
    param for param in EACH if param.values[0].startswith(("token_", "linear_", "rms", "layer"))
]


@pytest.mark.parametrize("name", ROWS)
def test_the_first_rows_are_the_same_alone(name):
    call = CALLS[name][1]()
    whole = call.run(*call.inputs)
    for num_rows in (1, 17):
        alone = call.run(*(x[:num_rows].clone() for x in call.inputs))
        for a, b in list(zip(alone, whole, strict=True))[: call.rows]:
            assert same(a, b[:num_rows])


@pytest.mark.covers("linear_token_logprobs", "linear_policy_loss")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_products_gradients_repeat_their_bits(dtype):
    weight = draw(VOCAB_SIZE, HIDDEN_SIZE, dtype=dtype) * HIDDEN_SIZE**-0.5
    hidden, ids = draw(NUM_ROWS, HIDDEN_SIZE, dtype=dtype), token_ids(NUM_ROWS)
    old, advantages = torch.randn(2, NUM_ROWS, device=DEVICE)
    mask = ids % 3 > 0

    def logprobs(*leaves):
        return fk.linear_token_logprobs(*leaves, ids, loss_mask=mask, return_entropy=True)

    def loss(*leaves):
        return fk.linear_policy_loss(*leaves, ids, old - 10, advantages, mask)[0]

    for function in (logprobs, loss):
        first, second = (with_gradients(function, hidden, weight) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert not a.isnan().any()
            assert torch.equal(a, b)

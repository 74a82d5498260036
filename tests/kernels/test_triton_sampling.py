"""The Triton sampler, in the interpreter or on a GPU.

Every row is judged by the definition in float64: the interval of the inverse CDF that its token
owns holds u, and the kept mass is that of the exact set. With the bits of u this is the whole
distribution, so few rows do where draws would have to be counted by the thousand.
"""

import math

import pytest
import torch

from fuserl_kernels import triton_runtime
from fuserl_kernels.reference.sampling import LANES, _top_k, _top_p, sample_tokens_fwd, uniform
from fuserl_kernels.token_logprobs import forward_triton, token_logprobs_fwd
from fuserl_kernels.triton_runtime import tl, triton
from fuserl_kernels.triton_sampling import (
    CONFIGURATIONS,
    MAX_VOCAB_SIZE,
    _key,
    _uniform_bits,
    _value,
    sample_triton,
)

pytestmark = [
    pytest.mark.skipif(triton_runtime.why_absent() is not None, reason="Triton cannot run here"),
    # numpy speaks of lanes without an entry, which the kernels select away
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning"),
]
DEVICE = triton_runtime.device_type()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = 2**62 + 12345
PLAIN = (1.0, 0, 1.0, 0.0)
TRUNCATIONS = {
    "top_k": (1.0, 5, 1.0, 0.0),
    "top_p": (0.8, 0, 0.9, 0.0),
    "min_p": (1.5, 0, 1.0, 0.05),
    "top_k and top_p": (1.0, 40, 0.7, 0.0),
    "all": (1.3, 30, 0.95, 0.02),
}


def identities(num_rows):
    requests = torch.tensor([5, -3, 2**40 + 7, 2**32 - 1], device=DEVICE)[:num_rows]
    return requests, torch.tensor([0, 9, 2**32 - 1, 77], device=DEVICE)[:num_rows]


def exact(logits, temperature, top_k, top_p, min_p):
    """log-probabilities before and after truncation, float64 [B, V]."""
    x = logits.double()
    x = (x - x.amax(-1, keepdim=True)) / temperature
    logprobs = torch.log_softmax(x, -1)
    if 0 < top_k < x.shape[1]:
        x = torch.where(_top_k(x, top_k), x, -torch.inf)
    if top_p < 1:
        x = torch.where(_top_p(x, top_p), x, -torch.inf)
    if min_p > 0:
        x = torch.where(x >= math.log(min_p), x, -torch.inf)
    return logprobs, torch.log_softmax(x, -1)


def check(logits, options, seed=SEED):
    requests, positions = identities(len(logits))
    token_ids, logprobs, truncated = sample_triton(logits, *options, seed, requests, positions)
    expected, kept = (x.cpu() for x in exact(logits, *options))
    columns = token_ids.cpu().unsqueeze(1)
    for ours, truth in ((logprobs, expected), (truncated, kept)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours.cpu().double(), truth.gather(1, columns)[:, 0], atol=3e-6, rtol=1e-6
        )
    # [B, turns, LANES] -> lane by lane
    by_lane = torch.nn.functional.pad(kept.exp(), (0, -kept.shape[1] % LANES))
    by_lane = by_lane.view(len(logits), -1, LANES).transpose(1, 2).flatten(1)
    place = columns % LANES * (by_lane.shape[1] // LANES) + columns // LANES
    after = by_lane.cumsum(1).gather(1, place)[:, 0]
    mass = by_lane.gather(1, place)[:, 0]
    u = uniform(seed, requests.cpu(), positions.cpu())
    assert (mass > 0).all()
    assert (after - mass <= u + 3e-6).all()
    assert (u <= after + 3e-6).all()
    return token_ids


@triton.jit
def _bits_kernel(seeds_ptr, requests_ptr, positions_ptr, out_ptr):
    i = tl.program_id(0)
    low, high = tl.load(seeds_ptr + 2 * i), tl.load(seeds_ptr + 2 * i + 1)
    bits = _uniform_bits(low, high, tl.load(requests_ptr + i), tl.load(positions_ptr + i))
    tl.store(out_ptr + i, bits.to(tl.int64))


def test_the_bits_are_those_of_the_reference():
    cases = [
        (0, 0, 0),
        (1, -1, 1),
        (2**31, 2**31, 2**31),
        (2**32 - 1, 2**32 + 3, 2**32 - 1),
        (2**63 - 1, -(2**63), 12),
        (0x299F31D0A4093822, 2**63 - 1, 2**16),
    ]
    seeds, requests, positions = torch.tensor(cases, device=DEVICE).unbind(1)
    out = torch.zeros_like(seeds)
    halves = torch.stack([seeds & 0xFFFFFFFF, seeds >> 32], 1).to(torch.int32).contiguous()
    _bits_kernel[(len(cases),)](halves, requests.contiguous(), positions.contiguous(), out)
    expected = [
        uniform(seed, torch.tensor([request]), torch.tensor([position]))
        for seed, request, position in cases
    ]
    assert torch.equal(out.cpu().double() * 2.0**-53, torch.cat(expected))


@triton.jit
def _keys_kernel(x_ptr, keys_ptr, back_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    keys = _key(tl.load(x_ptr + i).to(tl.float32), dtype)
    tl.store(keys_ptr + i, keys)
    tl.store(back_ptr + i, _value(keys, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_have_the_order_of_values(dtype):
    if dtype == torch.float32:
        x = torch.randn(1 << 16, device=DEVICE) * 10.0 ** torch.randint(-40, 38, (1 << 16,))
        x[:4] = torch.tensor([torch.inf, -torch.inf, 3.4028234e38, 1e-45])
    else:
        x = torch.arange(1 << 16, device=DEVICE).short().view(dtype)
    x = x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if dtype == torch.bfloat16:  # the interpreter widens bf16's denormals wrongly
        x = torch.where(x.abs() < 2.0**-126, 0, x)
    x = x.sort().values
    keys = torch.zeros(x.shape, dtype=torch.int64, device=DEVICE)
    back = torch.zeros(x.shape, device=DEVICE)
    _keys_kernel[(1,)](x, keys, back, 1 << 16)
    assert torch.equal(back, x.float())
    rises = x[1:] > x[:-1]
    assert (keys[1:] > keys[:-1])[rises].all()
    if dtype != torch.float32:  # neighbours, but for the two zeros
        nonzero = rises & (x[1:] != 0) & (x[:-1] != 0)
        assert nonzero.sum() > 60_000
        assert (keys[1:] - keys[:-1])[nonzero].eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 7, 2047, 2049, 9001])
def test_untruncated(dtype, vocab_size):
    check((torch.randn(3, vocab_size, device=DEVICE) * 3).to(dtype), PLAIN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncated(dtype, name):
    check((torch.randn(2, 3001, device=DEVICE) * 3).to(dtype), TRUNCATIONS[name])


@pytest.mark.parametrize("vocab_size", [1, 2, 2048, 8193])
def test_truncated_at_odd_sizes(vocab_size):
    logits = torch.randn(1, vocab_size, device=DEVICE).bfloat16()
    check(logits, TRUNCATIONS["all"])
    check(logits, TRUNCATIONS["top_p"])


def test_a_whole_vocabulary():
    logits = (torch.randn(1, 128256, device=DEVICE) * 2).bfloat16()
    check(logits, PLAIN)
    check(logits, (0.8, 0, 0.95, 0.0))


HOSTILE = {
    "every value of bf16": lambda: torch.arange(1 << 16).short().view(torch.bfloat16),
    "one heavy token": lambda: torch.cat([torch.randn(3000), torch.tensor([30.0])]),
    "two levels": lambda: (torch.arange(5000) % 7 == 0).float() * 8,
    "all equal": lambda: torch.full((4101,), -7.25),
    "zeros of both signs": lambda: torch.tensor([0.0, -0.0]).repeat(703),
    "tiny and large": lambda: torch.cat([torch.randn(1000) * 1e-30, torch.randn(1000)]),
    "mostly -inf": lambda: torch.where(torch.arange(5000) % 999 == 0, 1.5, -torch.inf),
    "a wide range": lambda: torch.linspace(-3e38, 3e38, 2500, dtype=torch.float64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows(name, dtype):
    """The guesses mislead here; the search must end at the same boundary."""
    row = HOSTILE[name]().float().to(DEVICE)
    row = row[row.isfinite() | (row == -torch.inf)].to(dtype).float()
    row = row[row < torch.inf].to(dtype)[None]
    check(row, (1.0, 0, 0.9, 0.0))
    check(row, (1.0, 3, 1.0, 0.0))


@pytest.mark.parametrize(("top_p", "count"), [(0.05, 1), (0.1, 1), (0.6, 6), (0.7, 7), (0.9, 9)])
def test_equal_masses_are_counted_exactly(top_p, count):
    logits = torch.zeros(1, 10, device=DEVICE)
    requests, positions = identities(1)
    token_ids, _, truncated = sample_triton(logits, 1.0, 0, top_p, 0.0, 1, requests, positions)
    assert float(truncated[0]) == pytest.approx(-math.log(count), abs=1e-6)
    assert int(token_ids[0]) < count


@pytest.mark.parametrize("top_k", [1, 2, 8999])
def test_ties_across_lanes_and_blocks_go_by_column(top_k):
    """The kept columns, read off the mass that the lane order gives the drawn token."""
    logits = torch.zeros(1, 20000, device=DEVICE, dtype=torch.bfloat16)
    logits[0, [12000, 9000, 12001, 15000]] = 3.0
    token_ids = check(logits, (1.0, top_k, 1.0, 0.0))
    greedy = sample_triton(logits, 0.0, 0, 1.0, 0.0, 1, *identities(1))
    assert greedy[0].tolist() == [9000]
    assert top_k > 2 or token_ids.tolist()[0] in [9000, 12000][:top_k]


LAYOUTS = {
    "columns": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "wide rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every other column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    logits = torch.randn(2, 2100, device=DEVICE)
    for options in (PLAIN, TRUNCATIONS["all"]):
        arguments = (*options, SEED, *identities(2))
        expected = sample_triton(logits, *arguments)
        got = sample_triton(LAYOUTS[layout](logits), *arguments)
        for mine, other in zip(got, expected, strict=True):
            assert torch.equal(mine, other)


def test_logprobs_have_the_bits_of_token_logprobs():
    logits = torch.randn(2, 3000, device=DEVICE)
    requests, positions = identities(2)
    for options in ((0.7, 0, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (0.0, 0, 1.0, 0.0)):
        token_ids, logprobs, truncated = sample_triton(logits, *options, SEED, requests, positions)
        expected, _, _ = forward_triton(
            logits, token_ids, None, options[0] or 1.0, 0.0, None, False
        )
        assert torch.equal(logprobs, expected)
        assert options[2] < 1 or torch.equal(truncated, expected * (options[0] > 0))


@pytest.mark.parametrize("column", [0, 2048, 9000])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_bad_entry_anywhere_breaks_its_row_only(column, bad):
    logits = torch.randn(2, 9001, device=DEVICE)
    logits[0, column] = bad
    for options in (PLAIN, TRUNCATIONS["top_p"]):
        token_ids, logprobs, truncated = sample_triton(logits, *options, SEED, *identities(2))
        assert int(token_ids[0]) == -1
        assert logprobs[0].isnan()
        assert truncated[0].isnan()
        assert 0 <= int(token_ids[1]) < 9001
        assert truncated[1].isfinite()


def test_too_many_columns_are_refused():
    logits = torch.zeros(1, 1, device=DEVICE).expand(1, MAX_VOCAB_SIZE + 1)
    with pytest.raises(ValueError, match="logits may have 4194304 columns at most"):
        sample_triton(logits, *PLAIN, SEED, *identities(1))


@pytest.mark.gpu
@pytest.mark.covers("sample_tokens")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", *TRUNCATIONS])
def test_bits_are_equal_in_every_configuration(dtype, name, monkeypatch):
    logits = (torch.randn(64, 128256, device=DEVICE) * 2).to(dtype)
    requests = torch.arange(64, device=DEVICE)
    options = TRUNCATIONS.get(name, PLAIN)
    results = []
    for configuration in CONFIGURATIONS[logits.element_size()]:
        monkeypatch.setattr("fuserl_kernels.triton_sampling.fastest", lambda *_, c=configuration: c)
        results.append(sample_triton(logits, *options, SEED, requests, requests))
        results.append(sample_triton(logits, *options, SEED, requests, requests))
    for result in results[1:]:
        for mine, other in zip(result, results[0], strict=True):
            assert torch.equal(mine, other)
    reference = sample_tokens_fwd(
        token_logprobs_fwd, logits.double(), *options, SEED, requests, requests
    )
    # A rounding at a step of a CDF may move a draw now and then, not often.
    assert (results[0][0] == reference[0]).float().mean() > 0.8

"""The native sampler: exact kept sets, the drawn token, bits, threads and instruction sets.

The judge is the reference in float64 with the same uniforms."""

import functools
import itertools

import pytest
import sampling_cases
import torch
from sampling_cases import DTYPES, KINDS, OPTIONS, keys, rows

import fuserl_kernels as fk
from fuserl_kernels import native
from fuserl_kernels.native_sampling import sample_native
from fuserl_kernels.reference.sampling import LANES, uniform

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)

assert_agree = functools.partial(sampling_cases.assert_agree, sample_native)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_definition(instructions, kind, dtype):
    num_rows = num_decided = 0
    for vocab_size in (1, 2, 7, 33, 2049, 4140):
        logits = rows(kind, 6, vocab_size).to(dtype)
        for seed, options in enumerate(sampling_cases.options_at(vocab_size)):
            num_rows += 6
            num_decided += assert_agree(logits, *options, seed, *keys(6))
    assert num_decided > 0.8 * num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 1e-4, 50.0, 1e6])
def test_extreme_temperatures(instructions, dtype, temperature):
    logits = (torch.randn(6, 3000) * 3).to(dtype)
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (70, 0.9071, 0.0), (0, 0.8123, 0.0531)]:
        assert assert_agree(logits, temperature, top_k, top_p, min_p, 3, *keys(6)) > 3


@pytest.mark.parametrize("kind", ["random", "few values", "cluster"])
def test_a_whole_vocabulary(kind):
    logits = rows(kind, 4, 128256)
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (0, 0.9517, 0.0), (50, 1.0, 0.0), (0, 1.0, 0.0531)]:
        decided = assert_agree(logits, 0.8, top_k, top_p, min_p, 1, *keys(4), margin=3e-7)
        assert decided > 1


def test_every_uniform_of_a_small_row(instructions):
    """A thousand draws from one row, each the entry at its uniform."""
    logits = torch.randn(1, LANES + 40).expand(1000, -1)
    options = (0.9, 25, 0.9123, 0.0123, 11, torch.arange(1000), torch.zeros(1000).long())
    assert assert_agree(logits, *options) > 990


def test_the_threshold_is_found_to_the_last_bit():
    """Neighbouring floats, shuffled: each k keeps exactly the k largest."""
    num_values = 4099
    values = 1 + torch.arange(num_values) * 2.0**-23
    logits = values[torch.randperm(num_values)].expand(64, -1)
    for top_k in (1, 2, 1000, 2048, 4098):
        token_ids, _, truncated = sample_native(logits, 1.0, top_k, 1.0, 0.0, 0, *keys(64))
        assert (logits[0, token_ids] >= values[num_values - top_k]).all()
        expected = -torch.tensor(float(top_k)).log().expand(64)
        torch.testing.assert_close(truncated, expected, atol=6e-4, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 999, 2049, 5002])
@pytest.mark.parametrize("vocab_size", [5003])
def test_ties_are_kept_by_column(top_k, vocab_size):
    """Of equal entries the first k: the last of them is drawn, none after it is."""
    logits = torch.zeros(1, vocab_size, dtype=torch.bfloat16).expand(3 * vocab_size, -1)
    numbers = torch.arange(3 * vocab_size)
    token_ids, _, truncated = sample_native(logits, 1.0, top_k, 1.0, 0.0, 0, numbers, numbers)
    assert token_ids.max() < top_k
    torch.testing.assert_close(truncated, -torch.tensor(float(top_k)).log().expand_as(truncated))
    if top_k < vocab_size / 2:
        assert token_ids.unique().numel() > 0.99 * top_k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [5, 2048, 40013])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_have_the_bits_of_token_logprobs(instructions, dtype, vocab_size, temperature):
    """Also where the maximum rises in many blocks; and without truncation both are the same."""
    logits = torch.randn(6, vocab_size) * 3
    logits[0] += torch.linspace(-200, 200, vocab_size)
    logits[1, : vocab_size // 2] = -torch.inf
    logits = logits.to(dtype)
    for top_k in (0, 3):
        token_ids, logprobs, truncated = sample_native(
            logits, temperature, top_k, 1.0, 0.0, 1, *keys(6)
        )
        want = fk.token_logprobs(logits, token_ids, temperature=temperature or 1.0)
        assert torch.equal(logprobs, want)
        if top_k == 0 and temperature:
            assert torch.equal(logprobs, truncated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [3, 2048, 9001])
def test_greedy_takes_the_first_of_the_largest(instructions, dtype, vocab_size):
    logits = torch.randint(-5, 5, (20, vocab_size)).to(dtype)
    token_ids, _, truncated = sample_native(logits, 0.0, 3, 0.5, 0.1, 0, *keys(20))
    first = [row.index(max(row)) for row in logits.tolist()]
    assert token_ids.tolist() == first
    assert (truncated == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_threads_and_neighbours_change_no_bit(dtype, options):
    logits = (torch.randn(37, 20011) * 2).to(dtype)
    request_ids, positions = keys(37)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5, 5):
            torch.set_num_threads(count)
            results.append(sample_native(logits, *options, 9, request_ids, positions))
    finally:
        torch.set_num_threads(threads)
    one = slice(17, 18)
    alone = sample_native(logits[one], *options, 9, request_ids[one], positions[one])
    for first, *others, single in zip(*results, alone, strict=True):
        assert all(torch.equal(first, other) for other in others)
        assert torch.equal(first[one], single)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("place", [0, 2500, 4999])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_without_a_softmax_is_reported_and_alone(instructions, options, place, poison):
    logits = torch.randn(5, 5000)
    numbers = keys(5)
    clean = sample_native(logits, *options, 1, *numbers)
    logits[1, place] = poison
    logits[3] = -torch.inf
    token_ids, logprobs, truncated = sample_native(logits, *options, 1, *numbers)
    assert token_ids[1::2].tolist() == [-1, -1]
    assert logprobs[1::2].isnan().all()
    assert truncated[1::2].isnan().all()
    for a, b in zip((token_ids, logprobs, truncated), clean, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_strided_logits(options):
    whole = torch.randn(8, 3, 700)
    numbers = keys(8)
    want = sample_native(whole[:, 1].contiguous(), *options, 5, *numbers)
    transposed = whole[:, 1].t().contiguous().t()
    wide = torch.stack([numbers[0], numbers[1]], 1)
    for got in (
        sample_native(whole[:, 1], *options, 5, *numbers),
        sample_native(transposed, *options, 5, wide[:, 0], wide[:, 1]),
    ):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


def test_uniforms_are_those_of_the_definition():
    """Equal logits draw by the uniform alone: over 2^16 of them its first 16 bits show."""
    vocab_size = LANES  # one column a lane: the token is floor(u * V)
    num_rows = 300
    for seed in (0, 1, 2**32 + 5, 2**63 - 1):
        request_ids, positions = keys(num_rows)
        request_ids[:3] = torch.tensor([0, -1, 2**63 - 1])
        positions[:2] = torch.tensor([0, 2**32 - 1])
        token_ids, _, _ = sample_native(
            torch.zeros(1, vocab_size).expand(num_rows, -1),
            *OPTIONS["plain"],
            seed,
            request_ids,
            positions,
        )
        u = uniform(seed, request_ids, positions)
        assert torch.equal(token_ids, (u * vocab_size).floor().long())


def test_a_lane_whose_mass_is_lost_is_passed_over():
    """Weights far below the final maximum: whatever the uniform, the token has mass."""
    logits = torch.full((1, 3 * LANES), -torch.inf)
    logits[0, :LANES] = -90.0
    logits[0, LANES + 7] = 0.0
    logits[0, 2 * LANES + 900] = 20.0
    token_ids, logprobs, _ = sample_native(
        logits.expand(3000, -1), *OPTIONS["plain"], 0, *keys(3000)
    )
    assert (token_ids == 2 * LANES + 900).all()
    assert (logprobs.abs() < 1e-9).all()


def test_options_change_between_calls_of_one_thread():
    """Scratch grows from a plain row to a truncated one, and to a longer one."""
    for vocab_size, options in itertools.product((9, 30000, 9), OPTIONS.values()):
        logits = torch.randn(2, vocab_size)
        if options[0]:
            assert_agree(logits, *options, 2, *keys(2))

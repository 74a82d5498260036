"""The GPU sampler in CUDA C++, on the CPU: csrc/cuda compiled as plain C++ over an emulation of a
block. The judge is the reference in float64 with the same uniforms. What only a GPU can show is in
test_gpu_cuda_sampling.py."""

import math

import emulated_cuda
import pytest
import sampling_cases
import torch
from sampling_cases import DTYPES, KINDS, OPTIONS, keys, rows

from fuserl_kernels import triton_runtime
from fuserl_kernels.reference.sampling import LANES, uniform
from fuserl_kernels.triton_helpers import (
    LANE_DOUBLINGS,
    _lane_statistics,
    _merge,
    _sum_pairs,
)
from fuserl_kernels.triton_runtime import tl, triton

pytestmark = pytest.mark.skipif(
    emulated_cuda.compiler() is None, reason="needs a C++ compiler to run CUDA C++ on the CPU"
)
LIST = 2048  # entries that the kernel sorts: kSlots of csrc/cuda/block.cuh


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated_cuda.build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def sample(library):
    """Runs each call twice, with the threads of a block in either order."""
    first, second = (emulated_cuda.sampler(library, descending) for descending in (False, True))

    def run(*arguments):
        results = first(*arguments)
        for a, b in zip(results, second(*arguments), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        return results

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_definition(sample, kind, dtype):
    num_rows = num_decided = 0
    for vocab_size in (1, 7, 2049, 4140, 8200):
        logits = rows(kind, 2, vocab_size).to(dtype)
        for seed, options in enumerate(sampling_cases.options_at(vocab_size)):
            num_rows += 2
            num_decided += sampling_cases.assert_agree(sample, logits, *options, seed, *keys(2))
    assert num_decided > 0.8 * num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 1e-4, 50.0, 1e6])
def test_extreme_temperatures(sample, dtype, temperature):
    """Cold: all but a few entries lie beyond the histogram. Hot: all lie in its first bin."""
    logits = (torch.randn(4, 5000) * 3).to(dtype)
    for top_k, top_p, min_p in [
        (0, 1.0, 0.0),
        (70, 0.9071, 0.0),
        (3000, 1.0, 0.0),
        (0, 0.8123, 0.0531),
    ]:
        options = temperature, top_k, top_p, min_p
        assert sampling_cases.assert_agree(sample, logits, *options, 3, *keys(4)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "few values", "cluster"])
def test_a_whole_vocabulary(sample, kind, dtype):
    logits = rows(kind, 2, 128256).to(dtype)
    for top_k, top_p, min_p in [(0, 1.0, 0.0), (0, 0.9517, 0.0), (50, 1.0, 0.0), (0, 1.0, 0.0531)]:
        sampling_cases.assert_agree(sample, logits, 0.8, top_k, top_p, min_p, 1, *keys(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefix_that_ends_beyond_the_histogram(sample, dtype):
    """One token far above a flat tail, where 1 part in 25 of the mass lies past the last bin."""
    logits = 0.1 * torch.randn(2, 128256)
    logits[:, 77] = 15.0
    logits = logits.to(dtype)
    for top_k, top_p in [(0, 0.9887), (100_000, 0.9887), (100_000, 1.0)]:
        sampling_cases.assert_agree(sample, logits, 1.0, top_k, top_p, 0.0, 4, *keys(2))
    token_ids, _, truncated = sample(logits, 1.0, 0, 0.9, 0.0, 4, *keys(2))
    assert (token_ids == 77).all()
    assert (truncated == 0).all()


@pytest.mark.parametrize("num_tied", [LIST - 1, LIST, LIST + 1, 3 * LIST])
def test_ties_about_as_many_as_the_list_holds(sample, num_tied):
    """Of equal entries the first k, behind one that is larger; the drawn token's share shows how
    many there are, and no token comes from a later column."""
    logits = torch.full((1, 4 * LIST), -5.0)
    logits[0, torch.randperm(4 * LIST)[: num_tied + 1]] = 1.0
    columns = (logits[0] == 1.0).nonzero()[:, 0]
    logits[0, columns[-1]] = 1.5
    for top_k in (2, num_tied // 2, num_tied, num_tied + 1):
        token_ids, _, truncated = sample(logits.expand(20, -1), 1.0, top_k, 1.0, 0.0, 0, *keys(20))
        allowed = torch.cat([columns[: top_k - 1], columns[-1:]])
        assert torch.isin(token_ids, allowed).all()
        mass = top_k - 1 + math.exp(0.5)
        want = logits[0, token_ids] - 1.0 - math.log(mass)
        torch.testing.assert_close(truncated, want, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 999, 2049, 5002])
def test_ties_are_kept_by_column(sample, top_k):
    logits = torch.zeros(1, 5003, dtype=torch.bfloat16).expand(200, -1)
    token_ids, _, truncated = sample(logits, 1.0, top_k, 1.0, 0.0, 0, *keys(200))
    assert token_ids.max() < top_k
    assert token_ids.unique().numel() > min(top_k, 200) / 2
    torch.testing.assert_close(truncated, -torch.tensor(float(top_k)).log().expand_as(truncated))


@pytest.mark.parametrize(("top_p", "count"), [(0.05, 1), (0.1, 1), (0.6, 6), (0.7, 7), (0.9, 9)])
def test_equal_masses_are_counted_exactly(sample, top_p, count):
    token_ids, _, truncated = sample(torch.zeros(1, 10), 1.0, 0, top_p, 0.0, 1, *keys(1))
    assert float(truncated[0]) == pytest.approx(-math.log(count), abs=1e-6)
    assert int(token_ids[0]) < count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_any_alignment_gives_the_same_bits(sample, dtype, options):
    """Rows that begin anywhere, at any distance: in whole turns, between them, and at both ends."""
    size = torch.empty((), dtype=dtype).element_size()
    for vocab_size in (5, LIST, 4 * LIST + 3):
        logits = (torch.randn(2, vocab_size) * 3).to(dtype)
        numbers = keys(2)
        want = sample(logits.clone(), *options, 5, *numbers)
        for offset, extra in [
            (0, 16 // size),
            (1, 0),
            (3, 1),
            (16 // size - 1, 3),
            (2, 16 // size),
        ]:
            memory = torch.full((offset + 2 * (vocab_size + extra),), 100.0, dtype=dtype)
            placed = memory[offset:].view(2, vocab_size + extra)[:, :vocab_size]
            placed.copy_(logits)
            for a, b in zip(sample(placed, *options, 5, *numbers), want, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_neighbours_change_no_bit(sample, dtype, options):
    logits = (torch.randn(5, 9011) * 2).to(dtype)
    request_ids, positions = keys(5)
    together = sample(logits, *options, 9, request_ids, positions)
    for row in (0, 3):
        one = slice(row, row + 1)
        alone = sample(logits[one].clone(), *options, 9, request_ids[one], positions[one])
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole[one], single)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 3, 2048, 9001])
def test_greedy_takes_the_first_of_the_largest(sample, dtype, vocab_size):
    logits = torch.randint(-5, 5, (8, vocab_size)).to(dtype)
    token_ids, logprobs, truncated = sample(logits, 0.0, 3, 0.5, 0.1, 0, *keys(8))
    assert token_ids.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert (truncated == 0).all()
    want = torch.log_softmax(logits.double(), -1).amax(-1)
    torch.testing.assert_close(logprobs.double(), want, atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("place", [0, 2500, 8999])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_without_a_softmax_is_reported_and_alone(sample, options, place, poison):
    logits = torch.randn(5, 9000)
    numbers = keys(5)
    clean = sample(logits, *options, 1, *numbers)
    logits[1, place] = poison
    logits[3] = -torch.inf
    token_ids, logprobs, truncated = sample(logits, *options, 1, *numbers)
    assert token_ids[1::2].tolist() == [-1, -1]
    assert logprobs[1::2].isnan().all()
    assert truncated[1::2].isnan().all()
    for a, b in zip((token_ids, logprobs, truncated), clean, strict=True):
        assert torch.equal(a[::2], b[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_but_one_are_impossible_or_far(sample, dtype):
    for rest in (-torch.inf, -1e30):
        logits = torch.full((3, 3000), rest, dtype=dtype)
        logits[:, 2100] = 1e30
        for top_k, top_p in [(0, 1.0), (1, 1.0), (5, 1.0), (5, 0.5), (2999, 0.9999), (0, 1e-9)]:
            token_ids, logprobs, truncated = sample(logits, 1.0, top_k, top_p, 0.0, 2, *keys(3))
            assert (token_ids == 2100).all()
            assert (logprobs == 0).all()
            assert (truncated == 0).all()


def test_uniforms_are_those_of_the_definition(sample):
    """Equal logits draw by the uniform alone: one column a lane, so the token is floor(u V)."""
    for seed in (0, 1, 2**32 + 5, 2**63 - 1):
        request_ids, positions = keys(40)
        request_ids[:3] = torch.tensor([0, -1, 2**63 - 1])
        positions[:2] = torch.tensor([0, 2**32 - 1])
        logits = torch.zeros(1, LANES).expand(40, -1)
        token_ids, _, _ = sample(logits, *OPTIONS["plain"], seed, request_ids, positions)
        assert torch.equal(token_ids, (uniform(seed, request_ids, positions) * LANES).long())


@pytest.mark.parametrize("options", [OPTIONS["plain"], (1.3, 5, 0.95, 0.02)], ids=["plain", "all"])
def test_distribution(library, options):
    """Pearson's chi-square of 2500 draws, against the definition's probabilities."""
    num_draws = 2500
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0, 0.9, -torch.inf, 0.0])
    sample = emulated_cuda.sampler(library)
    numbers = torch.arange(num_draws)
    token_ids, _, truncated = sample(logits.expand(num_draws, -1), *options, 7, numbers, numbers)
    counts = torch.bincount(token_ids, minlength=len(logits)).double()
    expected = torch.zeros(len(logits), dtype=torch.float64)
    expected[token_ids] = truncated.double().exp()
    assert float(expected.sum()) == pytest.approx(1.0, abs=1e-6)  # every possible token was drawn
    possible = expected > 0
    statistic = (
        (counts - num_draws * expected)[possible] ** 2 / (num_draws * expected[possible])
    ).sum()
    freedom = int(possible.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit
    # The same draws are told from a neighbouring distribution.
    biased = expected**1.25 / (expected**1.25).sum()
    assert (
        (counts - num_draws * biased)[possible] ** 2 / (num_draws * biased[possible])
    ).sum() > limit


@triton.jit
def _row_sums_kernel(x_ptr, sums_ptr, vocab_size, scale, DOUBLINGS: tl.constexpr):
    row = tl.program_id(0)
    lane_max, lane_sum, lane_dot = _lane_statistics(
        x_ptr + row * vocab_size, 1, vocab_size, scale, 0.0, False, False, 1
    )
    lane_sum, _ = _merge(lane_max, lane_sum, lane_dot, tl.max(lane_max, axis=0), scale, False)
    tl.store(sums_ptr + row, tl.sum(_sum_pairs(lane_sum[:, None], DOUBLINGS), axis=0))


@pytest.mark.skipif(
    not triton_runtime.INTERPRETING, reason="compares two programs that both run on the CPU"
)
@pytest.mark.parametrize("vocab_size", [1, 700, 2048, 2049, 4 * 2048 + 5, 40013])
def test_sums_have_the_order_of_the_triton_kernels(library, vocab_size):
    """At a temperature of log2(e) whole numbers have exact exponentials, whichever library makes
    them. Beside one of weight 1 those of 2^-24 are lost or not as the order has it, so equal bits
    mean an equal order."""
    logits = torch.randint(-25, -23, (12, vocab_size)).float()
    logits[range(12), torch.randint(vocab_size, (12,))] = 0.0
    logits[1] += torch.arange(vocab_size) % 50  # maxima that rise late
    logits[2, : vocab_size // 2] = -torch.inf
    sums = torch.empty(12)
    _row_sums_kernel[(12,)](logits, sums, vocab_size, 1.0, LANE_DOUBLINGS.value)
    found = emulated_cuda.row_sums(library, logits, 1.4426950408889634)
    assert torch.equal(found, sums)
    if vocab_size > 2048:
        exact = torch.exp2((logits - logits.amax(1, keepdim=True)).double()).sum(1)
        assert (found.double() != exact).any()

"""A row's bits depend on its own query, keys and lengths: not on the batch, the rows beside it, how
many share its prefix, the cache's capacity or the number of threads. And nothing leaks: what a row
may not see is NaN in every problem."""

import dataclasses
import math

import pytest
import torch
from attention_cases import Problem, problem, same_bits
from kernel_testing import runnable

import fuserl_kernels as fk
from fuserl_kernels.decode_attention import FORWARD

BACKENDS = [name for name in runnable(FORWARD) if name != "reference"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow|All-NaN)"),
    pytest.mark.parametrize("backend", BACKENDS),
]
DTYPES = [torch.float32, torch.bfloat16]
# Few heads where each program is interpreted.
HEADS = {"native": (6, 2), "triton": (2, 1)}
OPTIONS = [{}, {"window": 300, "softcap": 8.0}]


def subsets(num_rows: int) -> list[torch.Tensor]:
    """Each row alone, some of them in another order, and one of them many times."""
    alone = [torch.tensor([row]) for row in range(num_rows)]
    return [*alone, torch.tensor([3, 1, 0]), torch.tensor([1] * 9 + [2])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [None, (2, 300)])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "window and softcap"])
def test_batch_and_neighbours(backend, dtype, prefix, options):
    case = problem(heads=HEADS[backend], head_dim=40, capacity=560, prefix=prefix, dtype=dtype)
    with fk.use_backend(backend):
        whole = case.run(**options)
        assert not whole.isnan().any()
        for rows in subsets(5) if backend == "native" else subsets(5)[2:6:3]:
            assert same_bits(case.rows(rows).run(**options), whole[rows])


def grown(cache: torch.Tensor, capacity: int) -> torch.Tensor:
    """With room for more tokens, which hold NaN."""
    room = cache.new_full((*cache.shape[:2], capacity, cache.shape[3]), math.nan)
    room[:, :, : cache.shape[2]] = cache
    return room


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [None, (2, 130)])
def test_capacity(backend, dtype, prefix):
    """From one split to several: also from the kernel that needs no merge to those that do."""
    case = problem(3, heads=HEADS[backend], head_dim=32, capacity=200, prefix=prefix, dtype=dtype)
    with fk.use_backend(backend):
        want = case.run(window=150)
        for capacity in (256, 257, 700):
            larger = dataclasses.replace(
                case,
                key_cache=grown(case.key_cache, capacity),
                value_cache=grown(case.value_cache, capacity),
            )
            if prefix is not None:
                larger = dataclasses.replace(
                    larger,
                    prefix_keys=grown(case.prefix_keys, capacity),
                    prefix_values=grown(case.prefix_values, capacity),
                )
            assert same_bits(larger.run(window=150), want)


def test_an_empty_prefix_changes_no_bit(backend):
    case = problem(heads=HEADS[backend], capacity=300)
    other = problem(heads=HEADS[backend], capacity=300, prefix=(2, 40))
    names = ("prefix_keys", "prefix_values")
    given = {name: getattr(other, name) for name in names}
    with fk.use_backend(backend):
        want = case.run()
        for ids, lengths in ((-1, 40), (1, 0)):
            empty = dataclasses.replace(
                case,
                **given,
                prefix_ids=torch.full((5,), ids),
                prefix_lengths=torch.full((2,), lengths),
            )
            assert same_bits(empty.run(), want)


def shared_by(
    num_rows: int, at: int, heads: tuple[int, int], dtype: torch.dtype
) -> tuple[Problem, Problem]:
    """Rows that share a prefix, and the row `at` alone with it."""
    case = problem(num_rows, heads, 32, 20, (3, 280), dtype)
    case = dataclasses.replace(
        case, prefix_ids=torch.full((num_rows,), 2), prefix_lengths=torch.tensor([1, 0, 280])
    )
    case = dataclasses.replace(case, prefix_keys=case.prefix_keys.nan_to_num(0.5))
    case = dataclasses.replace(case, prefix_values=case.prefix_values.nan_to_num(-0.5))
    return case, case.rows(torch.tensor([at]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "at"), [(2, 1), (19, 17)])
def test_how_many_rows_share_a_prefix(backend, dtype, num_rows, at):
    case, alone = shared_by(num_rows, at, HEADS[backend], dtype)
    with fk.use_backend(backend):
        for options in ({}, {"window": 40}):
            assert same_bits(case.run(**options)[at : at + 1], alone.run(**options))


def test_runs_are_equal(backend):
    case = problem(heads=HEADS[backend], head_dim=16, prefix=(2, 290), capacity=270)
    with fk.use_backend(backend):
        assert same_bits(case.run(), case.run())


def test_a_broken_row_stays_alone(backend):
    """NaN and infinities in one row's query, or in one slot's tokens in use."""
    case = problem(heads=HEADS[backend], head_dim=32, prefix=(2, 40), capacity=270)
    case = dataclasses.replace(case, prefix_ids=torch.zeros(5, dtype=torch.int64))
    with fk.use_backend(backend):
        want = case.run()
        others = torch.tensor([0, 1, 3, 4])
        for poison in (math.nan, math.inf):
            query = case.query.clone()
            query[2] = poison
            got = dataclasses.replace(case, query=query).run()
            assert same_bits(got[others], want[others])
            assert got[2].isnan().all()
            values = case.value_cache.clone()
            values[case.slots[4], :, 100] = poison
            got = dataclasses.replace(case, value_cache=values).run()
            assert same_bits(got[:4], want[:4])
            assert not got[4].isfinite().all()


def test_tokens_before_the_window_never_leak(backend):
    case = problem(heads=HEADS[backend], capacity=600)
    keys, values = case.key_cache.clone(), case.value_cache.clone()
    for row in range(5):
        hidden = max(0, int(case.lengths[row]) - 70)
        for cache in (keys, values):
            cache[case.slots[row], :, :hidden] = math.nan
    clean = dataclasses.replace(case, key_cache=keys, value_cache=values)
    with fk.use_backend(backend):
        assert same_bits(clean.run(window=70), case.run(window=70))
        assert not clean.run(window=70).isnan().any()


def test_scores_of_minus_infinity_in_one_split(backend):
    """A split without weight is merged away; with no weight anywhere the row is 0 / 0."""
    case = problem(num_rows=3, heads=(2, 1), head_dim=16, capacity=520)
    case = dataclasses.replace(case, lengths=torch.tensor([520, 300, 520]), query=case.query.abs())
    case = dataclasses.replace(case, key_cache=case.key_cache.nan_to_num(0.1))
    case = dataclasses.replace(case, value_cache=case.value_cache.nan_to_num(0.1))
    keys = case.key_cache.clone()
    keys[case.slots[0], :, :256] = -torch.inf
    keys[case.slots[2]] = -torch.inf
    got_case = dataclasses.replace(case, key_cache=keys)
    truth = got_case.to(torch.float64).definition()
    with fk.use_backend(backend):
        got = got_case.run()
    torch.testing.assert_close(got[:2].double(), truth[:2], atol=2e-6, rtol=0)
    assert got[2].isnan().all()
    assert truth[2].isnan().all()

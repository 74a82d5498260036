"""The native decode attention: every instruction set, dtype and odd size, and any threads."""

import pytest
import torch
from attention_cases import problem, same_bits

import fuserl_kernels as fk
from fuserl_kernels import native

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)

# Of values of at most about 5: sums in float32, and the rounding of the result.
TOLERANCE = {
    torch.float32: {"atol": 3e-6, "rtol": 0},
    torch.bfloat16: {"atol": 3e-6, "rtol": 2.0**-8},
    torch.float16: {"atol": 3e-6, "rtol": 2.0**-11},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [1, 7, 32, 33, 64, 80, 96, 128, 256])
def test_head_dims(instructions, head_dim, dtype):
    for options in ({}, {"window": 61, "softcap": 4.0}):
        case = problem(heads=(6, 2), head_dim=head_dim, prefix=(3, 60), dtype=dtype)
        with fk.use_backend("native"):
            got = case.run(**options)
        truth = case.to(torch.float64).definition(**options)
        torch.testing.assert_close(got.double(), truth, **TOLERANCE[dtype])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 17, 35])
@pytest.mark.parametrize("capacity", [1, 5, 256, 257, 700])
def test_groups(instructions, group, capacity):
    for options in ({}, {"window": 261}):
        case = problem(
            heads=(2 * group, 2), head_dim=48, capacity=capacity, prefix=(2, capacity + 3)
        )
        with fk.use_backend("native"):
            got = case.run(**options)
        truth = case.to(torch.float64).definition(**options)
        torch.testing.assert_close(got.double(), truth, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("num_rows", [1, 2, 9])
@pytest.mark.parametrize("prefix", [None, (2, 600)])
def test_threads_change_no_bit(instructions, num_rows, prefix):
    """Few rows are shared out by splits, many by rows."""
    case = problem(num_rows, heads=(4, 1), head_dim=64, capacity=3000, prefix=prefix)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with fk.use_backend("native"):
                results.append(case.run(window=2900))
    finally:
        torch.set_num_threads(threads)
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


def test_what_many_rows_share_is_what_one_row_sees(instructions):
    """More rows than one walk over a prompt serves, with windows that begin inside it."""
    case = problem(70, heads=(6, 2), head_dim=32, capacity=300, prefix=(2, 500))
    for window in (None, 350):
        with fk.use_backend("native"):
            got = case.run(window=window)
        truth = case.to(torch.float64).definition(window=window or 0)
        torch.testing.assert_close(got.double(), truth, **TOLERANCE[torch.float32])
        one = torch.tensor([33])
        assert same_bits(case.rows(one).run(window=window), got[one])

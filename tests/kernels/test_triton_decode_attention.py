"""The Triton decode attention: tiles of any shape, and the plan of shared prefixes."""

import pytest
import torch
from attention_cases import problem

import fuserl_kernels as fk
from fuserl_kernels import triton_runtime

pytestmark = [
    pytest.mark.skipif(triton_runtime.why_absent() is not None, reason="Triton cannot run here"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow)"),
]
DEVICE = triton_runtime.device_type()
# Weights are rounded to the dtype of the values before their product.
TOLERANCE = {
    torch.float32: {"atol": 5e-6, "rtol": 0},
    torch.bfloat16: {"atol": 8e-3, "rtol": 2.0**-7},
    torch.float16: {"atol": 1e-3, "rtol": 2.0**-10},
}
SHAPES = [
    # heads, head_dim, capacity, prefix
    ((1, 1), 1, 1, None),
    ((4, 2), 7, 40, (2, 33)),
    ((6, 2), 33, 300, (3, 20)),
    ((7, 1), 64, 257, (2, 260)),
    ((2, 2), 80, 70, (1, 3)),
    ((70, 1), 96, 30, (2, 40)),
    ((17, 1), 128, 130, None),
    ((2, 2), 256, 260, (2, 9)),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "head_dim", "capacity", "prefix"), SHAPES)
def test_shapes(heads, head_dim, capacity, prefix, dtype):
    case = problem(1 if heads[0] > 16 else 3, heads, head_dim, capacity, prefix, dtype, DEVICE)
    every = ({}, {"window": 31, "softcap": 6.0})
    for options in every if dtype == torch.float32 else every[:1]:
        with fk.use_backend("triton"):
            got = case.run(**options)
        truth = case.to(torch.float64).definition(**options)
        torch.testing.assert_close(got.double(), truth, **TOLERANCE[dtype])

"""The Triton decode attention: tiles of any shape, and the plan of shared prefixes."""

import pytest
import torch
from attention_cases import problem

import fuserl_kernels as fk
from fuserl_kernels import triton_runtime
from fuserl_kernels.triton_decode_attention import PLAN_CONFIGURATION, _plan_kernel

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


@pytest.mark.parametrize("num_rows", [1, 64, 150])
@pytest.mark.parametrize("tile_rows", [1, 4, 16])
def test_the_plan_puts_each_row_into_a_tile_of_its_prefix(num_rows, tile_rows):
    num_prefixes = 7
    ids = torch.randint(-1, num_prefixes + 1, (num_rows,), device=DEVICE)  # one does not exist
    slots = torch.randint(-1, 5, (num_rows,), device=DEVICE)
    num_tiles = num_rows // tile_rows + num_prefixes
    members = torch.full((num_tiles * tile_rows,), -1, dtype=torch.int32, device=DEVICE)
    block = PLAN_CONFIGURATION.constants["BLOCK"]
    _plan_kernel[(-(-num_rows // block),)](
        ids, slots, members, num_rows, num_prefixes, tile_rows, **PLAN_CONFIGURATION.arguments()
    )
    planned = []
    for tile in members.view(num_tiles, tile_rows).tolist():
        rows = [row for row in tile if row >= 0]
        assert tile[: len(rows)] == rows, "no gap before the last"
        assert len({int(ids[row]) for row in rows}) <= 1
        assert rows == sorted(rows)
        planned += rows
    shared = [
        row for row in range(num_rows) if 0 <= int(ids[row]) < num_prefixes and slots[row] >= 0
    ]
    assert sorted(planned) == shared
    full = [tile for tile in members.view(num_tiles, tile_rows).tolist() if min(tile) >= 0]
    whole = sum(
        sum(int(ids[row]) == prefix for row in shared) // tile_rows
        for prefix in range(num_prefixes)
    )
    assert len(full) == whole, "no tile is left partly empty while rows remain"

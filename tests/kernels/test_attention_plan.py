"""decode_attention_plan: each row in a tile of its prefix, and attention that reads a plan."""

import dataclasses

import pytest
import torch
from attention_cases import problem
from kernel_testing import opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import triton_runtime
from fuserl_kernels.attention_plan import FORWARD
from fuserl_kernels.decode_attention import FORWARD as ATTENTION
from fuserl_kernels.decode_attention import uses_plan

NUM_PREFIXES = 7
HEADS = {1: 64, 4: 16, 16: 4, 64: 1}  # by the rows of a tile in bf16; one kv head


def numbers(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prefixes and slots, some of which do not exist."""
    ids = torch.randint(-1, NUM_PREFIXES + 1, (num_rows,))
    return ids, torch.randint(-1, 5, (num_rows,))


@pytest.mark.parametrize("num_rows", [0, 1, 64, 150])
@pytest.mark.parametrize("tile_rows", HEADS)
def test_the_plan_puts_each_row_into_a_tile_of_its_prefix(num_rows: int, tile_rows: int) -> None:
    ids, slots = numbers(num_rows)
    keys = torch.zeros(NUM_PREFIXES, 1, 3, 8, dtype=torch.bfloat16)
    with fk.use_backend("reference"):
        plan = fk.decode_attention_plan(keys, ids, num_heads=HEADS[tile_rows], slots=slots)
    assert plan.shape[1] == tile_rows
    planned = []
    for tile in plan.tolist():
        rows = [row for row in tile if row >= 0]
        assert tile[: len(rows)] == rows, "no gap before the last"
        assert len({int(ids[row]) for row in rows}) <= 1
        assert rows == sorted(rows)
        planned += rows
    shared = [
        row for row in range(num_rows) if 0 <= int(ids[row]) < NUM_PREFIXES and slots[row] >= 0
    ]
    assert sorted(planned) == shared
    full = [tile for tile in plan.tolist() if min(tile) >= 0]
    whole = sum(
        sum(int(ids[row]) == prefix for row in shared) // tile_rows
        for prefix in range(NUM_PREFIXES)
    )
    assert len(full) == whole, "no tile is left partly empty while rows remain"


@pytest.mark.skipif(triton_runtime.why_absent() is not None, reason="Triton cannot run here")
@pytest.mark.parametrize("num_rows", [0, 1, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_heads", [2, 10, 128])
@pytest.mark.parametrize("with_slots", [True, False])
def test_the_kernel_equals_the_definition(
    num_rows: int, dtype: torch.dtype, num_heads: int, with_slots: bool
) -> None:
    device = triton_runtime.device_type()
    ids, slots = (x.to(device) for x in numbers(num_rows))
    keys = torch.zeros(NUM_PREFIXES, 2, 3, 8, dtype=dtype, device=device)
    options = {"num_heads": num_heads, "slots": slots if with_slots else None}
    plans = []
    for name in ("reference", "triton"):
        with fk.use_backend(name):
            plans.append(fk.decode_attention_plan(keys, ids, **options))
    assert plans[1].dtype == torch.int32
    assert torch.equal(*plans)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("backend", runnable(ATTENTION))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_a_plan_has_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    case = problem(num_rows=5, prefix=(2, 290), capacity=40, dtype=dtype)
    case = dataclasses.replace(
        case, slots=case.slots.index_fill(0, torch.tensor([2], device=case.slots.device), -1)
    )
    with fk.use_backend("reference"):
        plan = fk.decode_attention_plan(
            case.prefix_keys, case.prefix_ids, num_heads=case.query.shape[1], slots=case.slots
        )
    with fk.use_backend(backend):
        assert torch.equal(case.run(prefix_plan=plan, window=200), case.run(window=200))
        assert uses_plan(case.query) == (backend == "triton")


@pytest.mark.skipif(triton_runtime.why_absent() is not None, reason="Triton cannot run here")
def test_the_plan_that_is_given_is_the_one_that_is_read() -> None:
    """Without a row in it, no row sees its prefix."""
    device = triton_runtime.device_type()
    case = problem(num_rows=5, prefix=(2, 20), capacity=40, device=device)
    with fk.use_backend("triton"):
        plan = fk.decode_attention_plan(case.prefix_keys, case.prefix_ids, num_heads=4)
        right = case.run(prefix_plan=plan)
        assert not torch.equal(case.run(prefix_plan=torch.full_like(plan, -1)), right)


@pytest.mark.parametrize("backend", runnable(FORWARD))
def test_opcheck_and_compile(backend: str) -> None:
    case = problem(prefix=(2, 30), capacity=40, head_dim=16)
    ids, slots, num_heads = case.prefix_ids, case.slots, case.query.shape[1]

    def run() -> torch.Tensor:
        plan = fk.decode_attention_plan(case.prefix_keys, ids, num_heads=num_heads, slots=slots)
        return case.run(prefix_plan=plan)

    with fk.use_backend(backend):
        opcheck("decode_attention_plan", case.prefix_keys, ids, slots, num_heads)
        opcheck("decode_attention_plan", case.prefix_keys, ids, None, num_heads)
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        assert torch.equal(compiled(), run())


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("prefix_keys must be a floating", {"prefix_keys": torch.zeros(2, 2, 20, 16).long()}),
        ("prefix_keys must have shape", {"prefix_keys": torch.zeros(0, 2, 20, 16)}),
        ("prefix_keys must have shape", {"prefix_keys": torch.zeros(2, 20, 16)}),
        ("num_heads must be a multiple", {"num_heads": 5}),
        ("num_heads", {"num_heads": 0}),
        ("prefix_ids must be an int64", {"prefix_ids": torch.zeros(3, dtype=torch.int32)}),
        ("prefix_ids must be an int64", {"prefix_ids": None}),
        ("slots must have shape", {"slots": torch.zeros(4, dtype=torch.int64)}),
    ],
)
def test_bad_arguments_are_named(message: str, changes: dict) -> None:
    arguments = {
        "prefix_keys": torch.zeros(2, 2, 20, 16),
        "prefix_ids": torch.zeros(3, dtype=torch.int64),
        "num_heads": 4,
        **changes,
    }
    keys, ids = arguments.pop("prefix_keys"), arguments.pop("prefix_ids")
    with pytest.raises(ValueError, match=message):
        fk.decode_attention_plan(keys, ids, **arguments)


@pytest.mark.parametrize(
    ("message", "plan"),
    [
        ("prefix_plan must be an int32", torch.zeros(3, 4, dtype=torch.int64)),
        ("prefix_plan must have shape", torch.zeros(3, 4, dtype=torch.int32)),
    ],
)
def test_a_plan_of_something_else_is_refused(message: str, plan: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        problem(prefix=(2, 20)).run(prefix_plan=plan)
    with pytest.raises(ValueError, match="prefix_keys must be given beside prefix_plan"):
        problem().run(prefix_plan=plan)

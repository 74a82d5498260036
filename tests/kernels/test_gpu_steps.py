"""What surrounds the layers of a decode step, on a GPU: the bookkeeping of rows and the plan that
attention reads."""

import pytest
import torch
from gpu_testing import assert_replays, assert_waits_for_nothing
from test_advance_rows import BY_SLOT, CHANGED, problem, run

import fuserl_kernels as fk

pytestmark = pytest.mark.gpu
NUM_PREFIXES, NUM_ROWS = 40, 300


@pytest.mark.covers("advance_rows")
@pytest.mark.parametrize("num_rows", [1, 64, NUM_ROWS])
def test_rows_advance_as_defined_and_the_same_each_time(num_rows: int) -> None:
    given = problem(num_rows, "cuda", num_slots=310)
    found = []
    for backend in ("reference", "triton", "triton"):
        arguments = {name: tensor.clone() for name, tensor in given.items()}
        with fk.use_backend(backend):
            columns = run(arguments)
        found.append((columns, arguments))
    (columns, want), *others = found
    for their_columns, got in others:
        for column, theirs in zip(columns, their_columns, strict=True):
            assert torch.equal(column, theirs)
        for name in CHANGED:
            # The last place is for rows that are off, where the order of writers is open.
            by_slot = slice(-1) if name in BY_SLOT else ...
            place = (..., slice(-1)) if name == "endings" else by_slot
            torch.testing.assert_close(
                got[name][place], want[name][place], rtol=0, atol=0, equal_nan=True, msg=name
            )


@pytest.mark.covers("advance_rows")
def test_rows_advance_without_a_wait_and_in_a_graph() -> None:
    given = problem(64, "cuda", num_slots=310)
    fresh = {name: tensor.clone() for name, tensor in given.items()}
    state = [*CHANGED]

    def call() -> list[torch.Tensor]:
        for name in state:
            given[name].copy_(fresh[name])
        columns = run(given)
        return [*columns, given["lengths"].clone(), given["slots"].clone()]

    def change() -> None:
        fresh["slots"].copy_(torch.randperm(310, device="cuda")[:64] - 9)
        fresh["slots"].clamp_(min=-1)
        given["drawn"].copy_(torch.randint(-1, 13, (64,), device="cuda"))

    assert_waits_for_nothing(call)
    assert_replays(call, change)


def numbers() -> tuple[torch.Tensor, torch.Tensor]:
    """Prefixes and slots, some of which do not exist."""
    ids = torch.randint(-1, NUM_PREFIXES + 1, (NUM_ROWS,), device="cuda")
    return ids, torch.randint(-1, 5, (NUM_ROWS,), device="cuda")


@pytest.mark.covers("decode_attention_plan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_heads", [2, 10, 128])
def test_a_plan_is_the_defined_one(dtype: torch.dtype, num_heads: int) -> None:
    ids, slots = numbers()
    keys = torch.zeros(NUM_PREFIXES, 2, 3, 8, dtype=dtype, device="cuda")
    plans = []
    for backend in ("reference", "triton", "triton"):
        with fk.use_backend(backend):
            plans.append(fk.decode_attention_plan(keys, ids, num_heads=num_heads, slots=slots))
    assert torch.equal(plans[0], plans[1])
    assert torch.equal(plans[1], plans[2])


@pytest.mark.covers("decode_attention_plan")
def test_a_plan_is_made_without_a_wait_and_in_a_graph() -> None:
    ids, slots = numbers()
    keys = torch.zeros(NUM_PREFIXES, 2, 3, 8, dtype=torch.bfloat16, device="cuda")

    def call() -> list[torch.Tensor]:
        return [fk.decode_attention_plan(keys, ids, num_heads=8, slots=slots)]

    def change() -> None:
        for old, new in zip((ids, slots), numbers(), strict=True):
            old.copy_(new)

    assert_waits_for_nothing(call)
    assert_replays(call, change)

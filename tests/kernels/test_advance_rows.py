"""advance_rows: what a row draws is written once and ends it where it should; the kernel does the
same, to the bit."""

import math
from typing import Any

import pytest
import torch
from kernel_testing import opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import triton_runtime
from fuserl_kernels.advance_rows import FORWARD, Advanced

NUM_SLOTS, CAPACITY, VOCAB_SIZE, NUM_PROMPTS = 9, 5, 13, 3
NUM_POSITIONS = 4 + CAPACITY
CHANGED = ("slots", "lengths", "token_rows", "logprob_rows", "truncated_rows", "endings", "counts")
BY_SLOT = ("token_rows", "logprob_rows", "truncated_rows")


def problem(num_rows: int, device: str = "cpu", num_slots: int = NUM_SLOTS) -> dict[str, Any]:
    """Arguments by name: some rows are off, some at their limit or past it, some draw nothing."""
    by_slot = (num_slots + 1, CAPACITY)
    slots = torch.randperm(num_slots)[:num_rows]
    slots = torch.where(torch.rand(num_rows) < 0.2, -1, slots)
    limits = torch.randint(1, CAPACITY + 1, (num_rows,))
    lengths = (torch.rand(num_rows) * limits).long()
    lengths = torch.where(slots < 0, torch.randint(0, CAPACITY + 1, (num_rows,)), lengths)
    drawn = torch.randint(-1, VOCAB_SIZE, (num_rows,))
    arguments = {
        "drawn": drawn,
        "logprobs": torch.randn(num_rows).masked_fill(drawn < 0, math.nan),
        "truncated_logprobs": torch.randn(num_rows).masked_fill(drawn < 0, math.nan),
        "slots": slots,
        "lengths": lengths,
        "limits": limits,
        "prompt_ids": torch.randint(0, NUM_PROMPTS, (num_rows,)),
        "prompt_lengths": torch.tensor([4, 1, 3]),
        "token_rows": torch.full(by_slot, -7),
        "logprob_rows": torch.full(by_slot, -7.0),
        "truncated_rows": torch.full(by_slot, -7.0),
        "endings": torch.zeros(2, num_slots + 1, dtype=torch.int64),
        "counts": torch.tensor([100, 1000]),
        "is_stop": torch.rand(VOCAB_SIZE) < 0.2,
        "is_flag": torch.rand(VOCAB_SIZE) < 0.4,
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()}


def run(arguments: dict[str, Any]) -> Advanced:
    return fk.advance_rows(**arguments, num_positions=NUM_POSITIONS)


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize("tables", [("is_stop", "is_flag"), ("is_stop",), ("is_flag",), ()])
def test_row_by_row(backend: str, tables: tuple[str, ...]) -> None:
    """Against a loop in Python over what each row is to become."""
    arguments = problem(NUM_SLOTS)
    for name in {"is_stop", "is_flag"} - set(tables):
        arguments[name] = None
    was = {name: None if x is None else x.tolist() for name, x in arguments.items()}
    with fk.use_backend(backend):
        got = run(arguments)
    num_ended = num_flagged = 0
    rows = {name: arguments[name].tolist() for name in CHANGED}
    untouched = set(range(NUM_SLOTS))
    for i, slot in enumerate(was["slots"]):
        drawn, length = was["drawn"][i], was["lengths"][i]
        place = min(length, CAPACITY - 1)
        token_id = max(drawn, 0)
        assert got.token_ids[i] == token_id
        assert got.places[i] == place
        assert got.used[i] == place + 1
        assert got.at[i] == (slot if slot >= 0 else NUM_SLOTS)
        prompt_length = was["prompt_lengths"][was["prompt_ids"][i]]
        assert got.positions[i] == prompt_length + place < NUM_POSITIONS
        assert got.slots[i] == slot
        if slot < 0:
            assert (rows["slots"][i], rows["lengths"][i]) == (slot, length)
            continue
        untouched.discard(slot)
        end = 2 if length + 1 >= was["limits"][i] else 0
        if was["is_stop"] is not None and was["is_stop"][token_id]:
            end = 1
        if drawn < 0:
            end = 3
        num_ended += end > 0
        num_flagged += bool(was["is_flag"] is not None and was["is_flag"][token_id] and not end)
        assert rows["lengths"][i] == length + 1
        assert rows["slots"][i] == (-1 if end else slot)
        assert [row[slot] for row in rows["endings"]] == [length + 1, end]
        assert rows["token_rows"][slot][place] == drawn
        for name, given in (("logprob_rows", "logprobs"), ("truncated_rows", "truncated_logprobs")):
            written = arguments[name][slot]
            torch.testing.assert_close(written[place], arguments[given][i], equal_nan=True)
            assert (written == -7).sum() == CAPACITY - 1
    assert rows["counts"] == [100 + num_ended, 1000 + num_flagged]
    assert num_ended > 0
    for name in BY_SLOT:
        assert (arguments[name][sorted(untouched)] == -7).all()


@pytest.mark.skipif(triton_runtime.why_absent() is not None, reason="Triton cannot run here")
@pytest.mark.parametrize("num_rows", [0, 1, 2, 128, 300])
def test_the_kernel_equals_the_definition(num_rows: int) -> None:
    given = problem(num_rows, triton_runtime.device_type(), num_slots=310)
    results = []
    for backend in ("reference", "triton"):
        arguments = {name: tensor.clone() for name, tensor in given.items()}
        with fk.use_backend(backend):
            columns = run(arguments)
        results.append((columns, arguments))
    (columns, want), (their_columns, got) = results
    for name, column, theirs in zip(Advanced._fields, columns, their_columns, strict=True):
        assert torch.equal(column, theirs), name
    for name in CHANGED:
        expected, found = want[name], got[name]
        if name in BY_SLOT:
            expected, found = expected[:-1], found[:-1]  # the last is for rows that are off
        if name == "endings":
            expected, found = expected[:, :-1], found[:, :-1]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("backend", runnable(FORWARD))
def test_opcheck_and_compile(backend: str) -> None:
    given = problem(6)
    positional = [given["logprobs"], given["drawn"], given["truncated_logprobs"]]
    positional += [given[name] for name in list(given)[3:]]
    # Rows that are off share the last place, where the order of writers is open.
    given["slots"].copy_(torch.arange(6))
    with fk.use_backend(backend):
        opcheck("advance_rows", *positional, NUM_POSITIONS)
        one, other = ({name: x.clone() for name, x in given.items()} for _ in range(2))
        compiled = torch.compile(lambda: run(one), fullgraph=True, backend="eager")
        for left, right in zip(compiled(), run(other), strict=True):
            assert torch.equal(left, right)
        assert torch.equal(one["token_rows"], other["token_rows"])


BAD = {
    "drawn must be torch.int64": {"drawn": torch.zeros(4)},
    "slots must be": {"slots": torch.zeros(8, dtype=torch.int64)[::2]},
    "lengths must be": {"lengths": torch.zeros(5, dtype=torch.int64)},
    "logprob_rows must be torch.float32": {"logprob_rows": torch.zeros(10, 5).double()},
    "truncated_rows must be": {"truncated_rows": torch.zeros(9, 5)},
    "endings must be": {"endings": torch.zeros(3, 10, dtype=torch.int64)},
    "counts must be": {"counts": torch.zeros(3, dtype=torch.int64)},
    "is_stop must be torch.bool": {"is_stop": torch.zeros(13)},
    "logprobs must have shape": {"logprobs": torch.zeros(5)},
    "truncated_logprobs must be a floating": {"truncated_logprobs": torch.zeros(4).long()},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(problem(4) | BAD[message])


def test_bad_num_positions_is_named() -> None:
    with pytest.raises(ValueError, match="num_positions"):
        fk.advance_rows(**problem(4), num_positions=0)

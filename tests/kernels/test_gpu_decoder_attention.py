"""decode_attention on a real GPU: right at real sizes, equal bits, without a wait, in a graph."""

import dataclasses
import math

import pytest
import torch
from attention_cases import Problem, problem, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.covers("decode_attention")]
DEVICE = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MODELS = {  # heads, kv heads, head_dim
    "llama 8b": (32, 8, 128),
    "qwen 0.5b": (14, 2, 64),
    "gemma 2b": (8, 1, 256),
    "pythia 160m": (12, 12, 64),
    "phi 2": (32, 32, 80),
    "falcon 7b": (71, 1, 64),
}


def drawn(num_rows, model, capacity, prefix=None, dtype=torch.bfloat16) -> Problem:
    *heads, head_dim = MODELS[model]
    return problem(num_rows, tuple(heads), head_dim, capacity, prefix, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prefix", [None, (5, 600)])
def test_real_models(model, dtype, prefix):
    case = drawn(17, model, 1100, prefix, dtype)
    for options in ({}, {"window": 700, "softcap": 30.0}):
        truth = case.to(torch.float64).definition(**options)
        torch.testing.assert_close(
            case.run(**options).double(), truth, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [None, (3, 700)])
def test_batch_neighbours_and_runs_change_no_bit(dtype, prefix):
    case = drawn(64, "qwen 0.5b", 1500, prefix, dtype)
    whole = case.run(window=1400)
    assert same_bits(case.run(window=1400), whole)
    for rows in ([5], [63, 1, 0], [7] * 40, range(3, 50)):
        index = torch.tensor(list(rows), device=DEVICE)
        assert same_bits(case.rows(index).run(window=1400), whole[index])


@pytest.mark.parametrize("dtype", DTYPES)
def test_capacity_changes_no_bit(dtype):
    case = drawn(9, "llama 8b", 256, None, dtype)
    want = case.run()
    for capacity in (257, 4000):
        room = case.key_cache.new_full((11, 8, capacity, 128), math.nan)
        keys, values = room.clone(), room
        keys[:, :, :256], values[:, :, :256] = case.key_cache, case.value_cache
        assert same_bits(dataclasses.replace(case, key_cache=keys, value_cache=values).run(), want)


def test_many_rows_share_prefixes():
    """More prefixes than rows have, and tiles that are partly full."""
    case = drawn(517, "qwen 0.5b", 40, (90, 513))
    torch.testing.assert_close(
        case.run().double(), case.to(torch.float64).definition(), atol=2e-2, rtol=2e-2
    )


def test_a_graph_serves_lengths_that_change():
    case = drawn(16, "llama 8b", 900, (4, 300))
    case = dataclasses.replace(
        case,
        key_cache=case.key_cache.nan_to_num(0.5),
        value_cache=case.value_cache.nan_to_num(0.5),
    )
    case.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for _ in range(3):
        case.lengths.copy_(torch.randint(0, 901, (16,)))
        case.prefix_ids.copy_(torch.randint(-1, 4, (16,)))
        case.slots.copy_(torch.randperm(18)[:16] - 2)
        graph.replay()
        assert same_bits(out, case.run())


def test_nothing_waits_for_the_device():
    case = drawn(16, "llama 8b", 900, (4, 300))
    case.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(window=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_exist_gives_nan():
    case = drawn(5, "qwen 0.5b", 300, (3, 20))
    want = case.run()
    for name, value in (("lengths", 301), ("lengths", -1), ("slots", 7), ("prefix_ids", 3)):
        numbers = getattr(case, name).clone()
        numbers[2] = value
        got = dataclasses.replace(case, **{name: numbers}).run()
        assert got[2].isnan().all()
        others = torch.tensor([0, 1, 3, 4], device=DEVICE)
        assert same_bits(got[others], want[others])


def test_compiles_whole():
    case = drawn(8, "qwen 0.5b", 300)
    compiled = torch.compile(lambda query: dataclasses.replace(case, query=query).run() + 0)
    torch.testing.assert_close(compiled(case.query), case.run())

"""Rollouts on a real GPU: right, captured once, without a wait a token, and with memory short.

What is asserted of bits: a run repeated gives the same ones. Between batches of other sizes the
library's products may sum in another order, so there it is tokens in float32, of greedy decoding on
weights so large that no two logits come close, and log-probabilities to within rounding.
"""

import copy
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from rollout_cases import assert_same, completions_of, options_of, requests_of

from fuserl.bench.decode_steps import NUM_STEPS, counted_waits
from fuserl.model.cache import CacheShape
from fuserl.model.config import Rope
from fuserl.model.heads import LanguageModel
from fuserl.model.notes import FolderNotes
from fuserl.policy import Policy
from fuserl.rollout.captured_step import bucket_of
from fuserl.rollout.engine import generate
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.live_rows import NewPrompt, NewRow
from fuserl.rollout.module_runner import GRAPH_STEPS, ModuleRunner
from fuserl.rollout.requests import Completion, End

pytestmark = [pytest.mark.gpu, pytest.mark.covers("rollout")]
DEVICE = torch.device("cuda")
MakeModel = Callable[..., LanguageModel]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen 3": {"qk_norm": True, "tie_embeddings": False},
    "gemma 2": {
        "norm_weight_offset": 1.0,
        "post_norms": True,
        "activation": "gelu_tanh",
        "window": 5,
        "window_layers": (True, False),
        "attention_softcap": 50.0,
        "final_softcap": 30.0,
        "embedding_scale": 4.0,
    },
    "gpt 2": {
        "rope": None,
        "norm": "layer",
        "gated_mlp": False,
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "num_kv_heads": 4,
    },
}


def on_gpu(model: LanguageModel) -> LanguageModel:
    return copy.deepcopy(model).to(DEVICE)


def on_host(found: dict[int, Completion]) -> list[tuple[list[int], torch.Tensor]]:
    """Token ids and log-probabilities, in the requests' order."""
    return [(found[i].token_ids.tolist(), found[i].logprobs.cpu()) for i in range(len(found))]


def assert_near(
    got: Sequence[tuple[list[int], torch.Tensor]], want: Sequence[tuple[list[int], torch.Tensor]]
) -> None:
    assert len(got) == len(want)
    for (ids, logprobs), (expected, theirs) in zip(got, want, strict=True):
        assert ids == expected
        torch.testing.assert_close(logprobs, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_cpu(make_model: MakeModel, family: str) -> None:
    model = make_model(seed=3, **FAMILIES[family])
    requests, options = requests_of(9, (30, 1, 17, 8)), options_of(7, 11, temperature=0.0)
    want = completions_of(model, requests, options)
    got = completions_of(on_gpu(model), requests, options, num_slots=5)
    assert_near(on_host(got), on_host(want))
    assert {c.end for c in got.values()} == {c.end for c in want.values()} == {End.STOP, End.LIMIT}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_logprobs_are_the_trainers(make_model: MakeModel, dtype: torch.dtype) -> None:
    """To what the products' rounding leaves, of sampled tokens."""
    model = on_gpu(make_model(seed=3, init_std=0.1)).to(dtype)
    requests = requests_of(9, (30, 17), samples=1)
    found = on_host(completions_of(model, requests, options_of(7), num_slots=4))
    policy = Policy(model, None, FolderNotes(), "made")
    theirs = policy.logprobs([request.ids for request in requests], [ids for ids, _ in found])
    bound = 1e-4 if dtype == torch.float32 else 0.1
    for (_, stored), computed in zip(found, theirs, strict=True):
        assert (stored - computed.cpu()).abs().max() < bound


def test_slots_and_order_change_no_greedy_token(make_model: MakeModel) -> None:
    model = on_gpu(make_model(seed=3))
    requests, options = requests_of(10, (25, 9, 14)), options_of(7, temperature=0.0)
    whole = on_host(completions_of(model, requests, options))
    for num_slots in (1, 3, 8):
        assert_near(on_host(completions_of(model, requests, options, num_slots=num_slots)), whole)
    turned = on_host(completions_of(model, requests[::-1], options, num_slots=6))
    pairs = [whole[2 * i : 2 * i + 2] for i in reversed(range(10))]
    assert_near(turned, [completion for pair in pairs for completion in pair])


def test_a_run_repeated_gives_the_same_bits(make_model: MakeModel) -> None:
    model = on_gpu(make_model(seed=3)).bfloat16()
    requests, options = requests_of(10, (25, 9, 14)), options_of(7, keep_before=1)
    first = completions_of(model, requests, options, num_slots=6)
    assert_same(completions_of(model, requests, options, num_slots=6), first)


def train_a_step(model: LanguageModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_one_graph_a_size_across_optimizer_steps(make_model: MakeModel) -> None:
    model, memory = on_gpu(make_model(seed=3)), RolloutMemory()
    # Limits alone end these rows, so that every rollout goes through the same sizes.
    requests, options = requests_of(8, (25, 9, 14)), options_of(temperature=0.0)
    before = on_host(completions_of(model, requests, options, memory=memory))
    kept = memory.kept
    assert isinstance(kept, ModuleRunner)
    assert kept.graphs is not None
    sizes = kept.graphs.sizes
    assert len(sizes) == len(set(sizes)) >= 2
    for _ in range(2):
        train_a_step(model)
        # A longer sequence elsewhere makes the rotary table anew; what took the old one's place
        # in memory must not be read by the graphs.
        model.trunk.layers[0].attn.table.upto(5000, DEVICE)  # type: ignore[union-attr, operator]
        torch.cuda.empty_cache()
        poison = [torch.full((1 << 16,), torch.nan, device=DEVICE) for _ in range(50)]
        got = on_host(completions_of(model, requests, options, memory=memory))
        assert memory.kept is kept
        assert kept.graphs.sizes == sizes
        assert_near(got, on_host(completions_of(model, requests, options)))
        del poison
    assert [ids for ids, _ in got] != [ids for ids, _ in before]
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    del kept
    memory.release()
    assert torch.cuda.memory_reserved() < held


def test_moved_weights_are_captured_anew(make_model: MakeModel) -> None:
    model, memory = on_gpu(make_model(seed=3)), RolloutMemory()
    requests, options = requests_of(4, (9,)), options_of(temperature=0.0)
    completions_of(model, requests, options, memory=memory)
    kept = memory.kept
    weight = model.trunk.norm.weight
    old = weight.data
    weight.data = -2 * old
    old.fill_(torch.nan)
    got = on_host(completions_of(model, requests, options, memory=memory))
    assert memory.kept is not kept
    assert_near(got, on_host(completions_of(model, requests, options)))


def realistic(make_model: MakeModel, **changes: Any) -> LanguageModel:
    sizes: dict[str, Any] = {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_layers": 12,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "max_positions": 4096,
        "rope": Rope(theta=1e6),
        "init_std": 0.02,
    }
    return on_gpu(make_model(**sizes | changes)).bfloat16()


def runner_of(model: LanguageModel, num_rows: int) -> ModuleRunner:
    """With rows that end at no limit within a few calls."""
    shape = CacheShape(num_slots=num_rows, capacity=600, num_prompts=2, prompt_capacity=64)
    runner = ModuleRunner(model, shape, options_of(7))
    runner.admit(
        [NewPrompt(0, list(range(40))), NewPrompt(1, [5])],
        [NewRow(row, row % 2, 600, row) for row in range(num_rows)],
    )
    return runner


def test_no_token_waits_for_the_host(make_model: MakeModel) -> None:
    """Sixty-four steps: the host waits once for what it must know at the end, and for looks that
    are long there; no copy to the host but those."""
    runner = runner_of(realistic(make_model), 64)
    runner.run(NUM_STEPS, 64)
    torch.cuda.synchronize()
    with counted_waits() as found:
        runner.run(NUM_STEPS, runner.rows.num_rows)
    if found.num_calls == 0:
        pytest.skip("the profiler sees no calls of the CUDA runtime on this machine")
    looks = NUM_STEPS // GRAPH_STEPS
    assert found.num_waits <= looks + 4
    assert found.num_copies_to_host <= looks + 4


def test_a_step_never_waits(make_model: MakeModel) -> None:
    """Outside of a graph too, in which a wait is an error anyhow."""
    runner = runner_of(realistic(make_model, num_layers=2), 24)
    with torch.no_grad():
        runner._step(24)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                runner._step(24)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_captures_take_seconds(make_model: MakeModel) -> None:
    """Of every size of 256 rows, with kernels compiled before."""
    model = realistic(make_model)
    runner_of(model, 256).run(1, 256)
    runner = runner_of(model, 256)
    assert runner.graphs is not None
    wanted = {bucket_of(n, 256) for n in range(1, 257)}
    with torch.no_grad():
        for size in sorted(wanted):
            runner.graphs.replay(runner._step, size, 1)
    assert set(runner.graphs.sizes) == wanted
    assert runner.graphs.seconds < 20


def test_graphs_share_their_memory(make_model: MakeModel) -> None:
    """Nineteen sizes need little more than the largest does."""
    model = realistic(make_model, num_layers=2)
    runner = runner_of(model, 256)
    assert runner.graphs is not None
    with torch.no_grad():
        runner.graphs.replay(runner._step, 256, 1)
        torch.cuda.empty_cache()
        largest = torch.cuda.memory_reserved()
        for size in (1, 2, 4, 8, *range(16, 256, 16)):
            runner.graphs.replay(runner._step, size, 1)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - largest < 256 << 20


def test_another_thread_computes_during_captures(make_model: MakeModel) -> None:
    """As a reward that is computed while sampling goes on: it launches, allocates and waits for its
    own results."""
    model = on_gpu(make_model(seed=3))
    requests, options = requests_of(8, (25, 9, 14)), options_of(temperature=0.0)
    want = on_host(completions_of(model, requests, options))
    done = threading.Event()

    def work() -> set[float]:
        sums, x = set(), torch.ones(256, 256, device=DEVICE)
        while not done.is_set():
            sums.add((x @ x).sum().item())
            x = x.clone()
        return sums

    with ThreadPoolExecutor(1) as pool:
        sums = pool.submit(work)
        try:
            got = on_host(completions_of(model, requests, options))
        finally:
            done.set()
        assert sums.result() == {256.0**3}
    assert_near(got, want)


def test_prepared_graphs_let_another_thread_draw_and_wait(make_model: MakeModel) -> None:
    """Neither works during a capture: there is none after the first token."""
    model, memory = on_gpu(make_model(seed=3)), RolloutMemory()
    requests, options = requests_of(8, (25, 9, 14)), options_of(temperature=0.0)
    want = on_host(completions_of(model, requests, options))
    rollout = generate(model, requests, options, memory=memory, shares_device=True)
    got = {(first := next(rollout)).index: first}
    done = threading.Event()

    def work() -> int:
        num_draws = 0
        while not done.is_set() or num_draws == 0:
            torch.rand(4, device=DEVICE)
            torch.cuda.synchronize()
            num_draws += 1
        return num_draws

    with ThreadPoolExecutor(1) as pool:
        num_draws = pool.submit(work)
        try:
            got |= {completion.index: completion for completion in rollout}
        finally:
            done.set()
        assert num_draws.result() > 0
    assert isinstance(memory.kept, ModuleRunner)
    assert memory.kept.graphs is not None
    num_slots = len(memory.kept.rows.slots)
    assert set(memory.kept.graphs.sizes) == {
        bucket_of(n, num_slots) for n in range(1, num_slots + 1)
    }
    assert_near(on_host(got), want)


def test_expandable_segments_hold_graphs() -> None:
    """The allocator's other way to get memory, which is chosen before the first allocation."""
    chosen = ("one_graph_a_size", "moved_weights", "share_their_memory")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", " or ".join(chosen)]
    environment = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:]
    assert f"{len(chosen)} passed" in found.stdout


def test_a_policy_captures_once(make_model: MakeModel) -> None:
    """Its second call finds the graphs of the first, and nothing is held after release."""
    policy = Policy(on_gpu(make_model(seed=3)), None, FolderNotes(), "made")
    prompts = [[5, 6, 7], [8, 9]]
    first = policy.generate(prompts, max_new_tokens=20, n=4)
    kept = policy._rollouts.kept
    assert isinstance(kept, ModuleRunner)
    assert kept.graphs is not None
    sizes = kept.graphs.sizes
    again = policy.generate(prompts, max_new_tokens=20, n=4)
    assert again.token_ids == first.token_ids
    assert policy._rollouts.kept is kept
    assert kept.graphs.sizes == sizes
    held = torch.cuda.memory_reserved()
    del kept
    policy.release()
    assert torch.cuda.memory_reserved() < held


def test_out_of_memory_goes_on_with_fewer_slots(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache of all slots is 0.8 GB, and there is a quarter of one for everything."""
    model = on_gpu(make_model(seed=3, num_kv_heads=4, head_dim=64, max_positions=4096))
    requests = requests_of(64, (3900, 5, 9, 6), samples=1)
    requests = [requests[0], *(r for r in requests if r.max_new_tokens < 100)]
    options = options_of(temperature=0.0)
    want = on_host(completions_of(model, requests, options, num_slots=8))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + (256 << 20)) / total, DEVICE
    )
    memory = RolloutMemory()
    try:
        with caplog.at_level(logging.WARNING):
            got = completions_of(
                model, requests, options, memory=memory, num_slots=64, kv_budget_bytes=1 << 40
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert "out of memory with 49 sequences at a time" in caplog.text
    assert memory.num_slots < 49
    assert_near(on_host(got), want)


def test_a_second_device_captures_on_its_own(make_model: MakeModel) -> None:
    """Whatever the current device is."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = copy.deepcopy(make_model(seed=3)).to("cuda:1")
    requests, options = requests_of(4, (20,)), options_of(temperature=0.0)
    want = completions_of(make_model(seed=3), requests, options)
    assert_near(on_host(completions_of(model, requests, options)), on_host(want))

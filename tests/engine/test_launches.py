"""How much a decode step gives a GPU to launch: small models wait for launches, 1 to 2 us each."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launches import counted_launches

from fuserl.model import attention
from fuserl.model.cache import CacheShape
from fuserl.model.config import DecoderConfig
from fuserl.model.heads import LanguageModel
from fuserl.rollout.live_rows import NewPrompt, NewRow
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule
from fuserl_kernels import triton_runtime

pytestmark = pytest.mark.skipif(
    triton_runtime.why_no_compiler() is not None, reason="there are no kernels without Triton"
)
SHAPE = CacheShape(num_slots=8, capacity=300, num_prompts=4, prompt_capacity=300)
Launched = Callable[[int, Callable[[ModuleRunner], object]], Counter[str]]


@pytest.fixture(autouse=True)
def _plain_torch() -> None:
    """Without the fills that deterministic mode adds."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, sizes: DecoderConfig, request: Any) -> Launched:
    """What a call launches with a model of so many layers, in bf16."""
    changes, keep_before = getattr(request, "param", ({}, 0))

    def count(num_layers: int, call: Callable[[ModuleRunner], object]) -> Counter[str]:
        config = dataclasses.replace(sizes, num_layers=num_layers, max_positions=700, **changes)
        with torch.device("meta"):
            model = LanguageModel(config).to(torch.bfloat16)
        rule = StopRule(token_ids=frozenset({2}))
        options = RunnerOptions(sampling=SamplingParams(), stop=rule, keep_before=keep_before)
        runner = ModuleRunner(model, SHAPE, options)
        with torch.no_grad(), counted_launches(monkeypatch) as names:
            call(runner)
        return Counter(names)

    return count


QWEN3 = ({"qk_norm": True}, 0)
BIASES = ({"qkv_bias": True, "output_bias": True, "tie_embeddings": False}, 0)
LAYER = {
    "_rotary_kernel": 1,  # norms of the heads and the write into the cache in it
    "_prefix_kernel": 1,
    "_slot_kernel": 1,
    "_merge_kernel": 1,
    "_glu_kernel": 1,
    "_fwd_kernel": 2,  # a norm with the addition before it
}


def products(counts: Counter[str]) -> int:
    return counts["aten.mm"] + counts["aten.addmm"]


@pytest.mark.parametrize("launched", [({}, 0), QWEN3, BIASES], ids=str, indirect=True)
def test_a_layer_of_a_step_is_eleven_launches(launched: Launched) -> None:
    one, two, three = (launched(n, lambda runner: runner._step(4)) for n in (1, 2, 3))
    layer = two - one
    assert three - two == layer
    assert products(layer) == 4
    assert {name: n for name, n in layer.items() if not name.startswith("aten.")} == LAYER
    assert layer.total() == 11


@pytest.mark.parametrize("launched", [({}, 0), QWEN3, BIASES], ids=str, indirect=True)
def test_around_the_layers_of_a_step_are_eight(launched: Launched) -> None:
    one, two = (launched(n, lambda runner: runner._step(4)) for n in (1, 2))
    around = one - (two - one)
    assert products(around) == 1
    around = Counter({n: c for n, c in around.items() if n not in ("aten.mm", "aten.addmm")})
    assert around == {
        "_sample_kernel": 1,
        "_advance_kernel": 1,
        "aten.embedding": 1,
        "aten.full": 1,  # with the next, the plan of attention
        "_plan_kernel": 1,
        "_fwd_kernel": 1,
        "aten.copy_": 1,  # to where the next step reads it
    }


@pytest.mark.parametrize("launched", [({}, 1)], indirect=True)
def test_a_kept_stream_is_one_addition_and_one_write(launched: Launched) -> None:
    plain = {"aten.index_put_": 1, "aten.add": 1}
    counts = launched(2, lambda runner: runner._step(4))
    assert counts.total() == 2 * 11 + 8 + 2
    assert {name: counts[name] for name in plain} == plain


def test_a_prompt_goes_through_the_attention_of_training(
    monkeypatch: pytest.MonkeyPatch, launched: Launched
) -> None:
    """Once a layer, on keys that are written beside it; no query of it reads the cache."""
    monkeypatch.setattr(attention, "choice", lambda *_: ("varlen", "as on CUDA"))
    prompts = [NewPrompt(0, list(range(40))), NewPrompt(1, list(range(7)))]

    def admit(runner: ModuleRunner) -> None:
        runner.admit(prompts, [NewRow(0, 0, 5, 0), NewRow(1, 1, 5, 1)])

    layer = launched(3, admit) - launched(2, admit)
    assert products(layer) == 4
    assert layer["aten._varlen_attn"] == layer["_rotary_kernel"] == layer["_glu_kernel"] == 1
    assert layer["aten.index_put_"] == 2
    assert not {"_slot_kernel", "_prefix_kernel", "_merge_kernel"} & set(layer)

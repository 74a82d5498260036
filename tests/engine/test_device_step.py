"""A decode step as it runs where a device works apart from its host: on torch's meta device, whose
tensors hold nothing that anyone could wait for. What a captured step must not do fails here."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fuserl.model.cache import CacheShape
from fuserl.model.config import DecoderConfig
from fuserl.model.heads import LanguageModel
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule
from fuserl.tokenizer import Tokenizer

SHAPE = CacheShape(num_slots=8, capacity=300, num_prompts=4, prompt_capacity=300)
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama biases, untied": {"qkv_bias": True, "output_bias": True, "tie_embeddings": False},
    "qwen 3": {"qk_norm": True},
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
        "output_bias": True,
        "mlp_bias": True,
        "num_kv_heads": 4,
    },
    "gpt j": {"parallel_residual": True, "shared_norm": True, "norm": "layer", "head_bias": True},
}
READS_DATA = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "item"}


class Watch(TorchDispatchMode):
    """Refuses what waits for a device, copies from one to another, and tensors of the host that
    are more than a number. Remembers what computes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket).partition(".")[2]
        assert name not in READS_DATA, f"{name} waits for the device"
        if name.startswith("index"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            assert not masks, f"{name} by a mask waits for its count"
        given = list(_tensors((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        devices = {tensor.device.type for tensor in (*given, *_tensors(out)) if tensor.dim()}
        assert devices <= {"meta"}, f"{name} meets {devices}"
        self.ops.append(name)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def step_of(config: DecoderConfig, options: RunnerOptions, dtype: torch.dtype) -> list[str]:
    """The ops of a step of four rows."""
    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
    runner = ModuleRunner(model, SHAPE, options)
    with torch.no_grad(), Watch() as watch:
        runner._step(4)
    return watch.ops


@pytest.mark.parametrize("family", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep_before", [0, 1])
def test_a_step_never_waits(
    family: str, dtype: torch.dtype, keep_before: int, sizes: DecoderConfig, tokenizer: Tokenizer
) -> None:
    config = dataclasses.replace(
        sizes, vocab_size=tokenizer.vocab_size, max_positions=700, **CHANGES[family]
    )
    rule = StopRule(token_ids=frozenset({2}), strings=("dog",), tokenizer=tokenizer)
    sampling = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)
    options = RunnerOptions(sampling=sampling, stop=rule, keep_before=keep_before)
    ops = step_of(config, options, dtype)
    assert ops.count("rotary_kv_write") == ops.count("decode_attention") == 2
    assert ops.count("sample_tokens") == ops.count("advance_rows") == 1


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: int(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: x.unique(),
        lambda x: x.to("cpu"),
        lambda x: x + torch.ones(4).to(x),
        lambda x: x.tolist(),
    ],
)
def test_the_watch_sees(waits: Callable[[Tensor], object]) -> None:
    with (
        pytest.raises((AssertionError, RuntimeError, NotImplementedError)),
        Watch(),
    ):
        waits(torch.ones(4, device="meta"))

"""The decode loop in C++: bit for bit what the decoder's modules give with packed products."""

import dataclasses
from typing import Any

import pytest
import torch
from random_models import (
    CONFIGS,
    SAMPLINGS,
    assert_same,
    choose_runner,
    frequent_token,
    ragged_prompts,
    scramble,
    scrambled,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fuserl_kernels as fk
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import Packing
from fuserl.model.products import PackedProducts
from fuserl.model.steps import PackedStep
from fuserl.rollout import native_runner
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.engine import make_runner
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.native_runner import NativeRunner
from fuserl_kernels import native

pytestmark = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)
PROMPTS = ragged_prompts([3, 1, 17, 9, 5])
LIMITS = [20, 7, 30, 12, 1]
DTYPES = [torch.float32, torch.bfloat16]
of_each_kind = pytest.mark.parametrize("name", CONFIGS)
of_each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


def sample(model: LanguageModel, sampling: str = "min_p", **changes: Any) -> Completions:
    options: dict[str, Any] = {
        "max_new_tokens": LIMITS,
        "sampling": SAMPLINGS[sampling],
        "num_samples": 3,
        "num_slots": 4,
    }
    return decode(model, PROMPTS, **(options | changes))


def sample_by_modules(model: LanguageModel, *args: Any, **options: Any) -> Completions:
    with pytest.MonkeyPatch.context() as patch:
        assert make_runner(model) is NativeRunner
        assert choose_runner("modules", patch) is make_runner(model)
        out = sample(model, *args, **options)
    assert out.facts.weight_bytes > 0, "products were not packed"
    return out


def assert_equal_to_modules(model: LanguageModel, sampling: str, **options: Any) -> Completions:
    """With an EOS that ends some rows early, and slots that are filled again."""
    assert make_runner(model) is NativeRunner
    eos = frequent_token(
        model, PROMPTS, max_new_tokens=LIMITS, sampling=SAMPLINGS[sampling], num_samples=3
    )
    ours = sample(model, sampling, eos_token_id=eos, **options)
    assert 0 < int(ours.has_eos.sum()) < len(ours.has_eos)
    theirs = sample_by_modules(model, sampling, eos_token_id=eos, **options)
    assert_same(ours, theirs)
    assert ours.facts.weight_bytes == theirs.facts.weight_bytes
    return ours


@of_each_kind
@of_each_dtype
def test_equals_the_modules(name: str, dtype: torch.dtype) -> None:
    assert_equal_to_modules(scrambled(name, dtype), "min_p")


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_equals_the_modules_however_tokens_are_drawn(sampling: str) -> None:
    assert_equal_to_modules(scrambled(), sampling)


@pytest.mark.parametrize("instructions", ["avx2", "baseline"])
def test_equals_the_modules_on_lesser_processors(instructions: str) -> None:
    module = native.module()
    best = module.build_info()["instructions"]
    if instructions == "avx2" and best == "baseline":
        pytest.skip("this processor has no avx2")
    module.set_instruction_set(instructions)
    try:
        for dtype in DTYPES:
            assert_equal_to_modules(scrambled("gemma2", dtype), "cool")
    finally:
        module.set_instruction_set(best)


@of_each_kind
@of_each_dtype
@torch.no_grad()
def test_the_kept_stream_is_that_of_the_modules_and_of_one_forward(
    name: str, dtype: torch.dtype
) -> None:
    """Prompts once, completions with their last tokens: before each layer above the lowest."""
    model = scrambled(name, dtype)
    for layer in (1, 2):
        ours = sample(model, keep_before=layer)
        theirs = sample_by_modules(model, keep_before=layer)
        states, starts = ours.trunk_states, ours.trunk_starts
        assert states is not None
        assert starts is not None
        assert_same(ours, theirs)
        assert len(states) == sum(map(len, PROMPTS)) + int(ours.lengths.sum())
        assert torch.equal(starts, torch.as_tensor(theirs.trunk_starts))
        for row, length in enumerate(ours.lengths.tolist()):
            prompt = PROMPTS[row // 3]
            ids = torch.tensor([*prompt, *ours.token_ids[row, :length].tolist()])
            packing = Packing.of([len(ids)], prompt_lengths=[len(prompt)])
            first, second = starts[row].tolist()
            got = torch.cat([states[first : first + len(prompt)], states[second : second + length]])
            exact = model.trunk.lower(ids, PackedStep(packing, exact=True), layer)
            assert torch.equal(got, exact)
            if dtype == torch.float32:  # bf16 is rounded on the way
                whole = model.trunk.lower(ids, PackedStep(packing), layer)
                near = 1e-5 * float(whole.abs().max())
                torch.testing.assert_close(got, whole, rtol=0, atol=near)


@of_each_dtype
def test_prompts_may_be_computed_in_any_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scrambled("gemma2", dtype)
    whole = sample(model, keep_before=1)
    monkeypatch.setattr(native_runner, "PASS_TOKENS", 7)
    parts = sample(model, keep_before=1)
    assert_same(parts, whole)


@of_each_dtype
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    """Products large enough to be shared out."""
    config = dataclasses.replace(
        CONFIGS["qwen"], hidden_size=96, intermediate_size=512, vocab_size=800
    )
    model = scramble(LanguageModel(config)).to(dtype)
    alone = sample(model)
    before = torch.get_num_threads()
    try:
        for num_threads in (2, 3):
            torch.set_num_threads(num_threads)
            assert_same(sample(model), alone)
    finally:
        torch.set_num_threads(before)


class LargeTensors(TorchDispatchMode):
    """Sizes in bytes of new storages of at least `least` bytes, by address."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, {}
        self._held: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.least:
                self.seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                self._held.append(tensor)
        return out


def test_weights_are_copied_once_to_be_packed_and_no_more() -> None:
    config = dataclasses.replace(
        CONFIGS["llama_grouped"], hidden_size=64, intermediate_size=256, vocab_size=2000
    )
    model = scramble(LanguageModel(config))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    own = {p.data_ptr() for p in matrices}
    with LargeTensors(min(p.nbytes for p in matrices)) as large:
        out = decode(
            model, [[5], [6, 7]], max_new_tokens=4, sampling=SAMPLINGS["cool"], num_slots=1
        )
    packed = PackedProducts(model.trunk, model.output_weight)
    assert out.facts.weight_bytes == packed.num_bytes
    new = [size for address, size in large.seen.items() if address not in own]
    assert len(new) == 1 + 4 * config.num_layers, "one a product, and the head"
    assert out.facts.weight_bytes <= sum(new) <= out.facts.weight_bytes + 64 * len(new)


@of_each_dtype
def test_an_optimizers_step_shows_in_the_next_rollout(dtype: torch.dtype) -> None:
    """Norms, biases and embeddings are read where they are, and matrices packed anew."""
    model = scrambled("qwen", dtype)
    before = sample(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    for name, parameter in model.named_parameters():
        if "layers.0" in name or "layers.2" in name:
            continue  # as layer 1
        kept = parameter.detach().clone()
        gradient = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
        parameter.grad = gradient.to(dtype)
        torch.optim.SGD([parameter], lr=0.5).step()
        after = sample(model)
        assert_same(after, sample_by_modules(model))
        assert not torch.equal(after.logprobs[:, :1], before.logprobs[:, :1])
        with torch.no_grad():
            parameter.copy_(kept)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert_same(sample(model), before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope": None}, "Llama-style"),
        ({"gated_mlp": False}, "Llama-style"),
        ({"parallel_residual": True}, "Llama-style"),
    ],
)
def test_what_has_no_native_loop_runs_through_the_modules(
    changes: dict[str, Any], reason: str
) -> None:
    model = scramble(LanguageModel(dataclasses.replace(CONFIGS["llama_grouped"], **changes)))
    assert reason in str(native_runner.why_not(model))
    assert make_runner(model) is ModuleRunner
    assert sample(model).facts.weight_bytes > 0


def test_the_choice_follows_the_backend_and_the_dtype() -> None:
    model = scrambled()
    assert native_runner.why_not(model) is None
    with fk.use_backend("reference"):
        assert make_runner(model) is ModuleRunner
        assert sample(model).facts.weight_bytes == 0
    wide = scrambled(dtype=torch.float64)
    assert "torch.float64" in str(native_runner.why_not(wide))
    assert make_runner(wide) is ModuleRunner

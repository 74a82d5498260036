"""The decoder's own promises, for each switch: packing changes nothing, cached decoding equals one
full forward, layers recomputed in the backward pass give the same bits. That it equals
transformers' models is test_families.py."""

import dataclasses
from typing import Any

import pytest
import torch
from packed import run, run_one
from random_models import scramble
from torch import Tensor, nn

from fuserl.model.attention import choice, packed_attention
from fuserl.model.cache import CacheShape, KVCache
from fuserl.model.config import DecoderConfig, Rope, RopeScaling, small_config
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.packing import Packing
from fuserl.model.products import torch_product
from fuserl.model.steps import DecodeStep, PackedStep, PrefillStep

GROUPED = DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=64,
)
CONFIGS = {
    "grouped_tied": GROUPED,
    "multi_head_untied_biased": dataclasses.replace(
        GROUPED,
        num_kv_heads=4,
        tie_embeddings=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    ),
    "one_kv_head_wide_heads": dataclasses.replace(
        GROUPED, num_kv_heads=1, head_dim=12, rope=Rope(theta=5e5), norm_eps=1e-6
    ),
    "window_qk_norm_yarn": dataclasses.replace(
        GROUPED,
        window=4,
        qk_norm=True,
        rope=Rope(scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=16)),
    ),
    "gemma_like": dataclasses.replace(
        GROUPED,
        window=3,
        window_layers=(True, False, True),
        local_rope=Rope(theta=100.0),
        norm_weight_offset=1.0,
        post_norms=True,
        attention_softcap=5.0,
        final_softcap=3.0,
        attention_scale=0.5,
        embedding_scale=32**0.5,
        activation="gelu_tanh",
    ),
    "learned_positions": dataclasses.replace(
        GROUPED, rope=None, norm="layer", gated_mlp=False, activation="gelu_tanh", qkv_bias=True
    ),
    "parallel": dataclasses.replace(
        GROUPED, parallel_residual=True, norm="layer", gated_mlp=False, rope=Rope(dim=4)
    ),
    "parallel_one_norm": dataclasses.replace(
        GROUPED,
        parallel_residual=True,
        shared_norm=True,
        norm="layer",
        gated_mlp=False,
        activation="gelu",
        rope=Rope(dim=6, interleaved=True),
    ),
}

config_of_each_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_rows(lengths: list[int]) -> list[list[int]]:
    return [torch.randint(61, (length,)).tolist() for length in lengths]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients_near(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@config_of_each_kind
def test_packed_equals_one_sequence_at_a_time(config: DecoderConfig) -> None:
    """Block-diagonal attention: hidden states and gradients."""
    model = scramble(LanguageModel(config))
    rows = random_rows([4, 13, 1, 9])
    weights = torch.randn(27, 61)
    packed = model.logits(run(model, rows))
    (packed.log_softmax(-1) * weights).sum().backward()
    packed_gradients = gradients(model)
    assert packed.std() > 0.3

    alone = torch.cat([model.logits(run_one(model, row)) for row in rows])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    (alone.log_softmax(-1) * weights).sum().backward()
    assert_gradients_near(packed_gradients, gradients(model))
    expected = dict(model.named_parameters()).keys()
    assert packed_gradients.keys() == expected, "every parameter takes part"


@config_of_each_kind
@pytest.mark.parametrize("from_cache", [True, False])
@torch.no_grad()
def test_cached_decode_equals_one_full_forward(config: DecoderConfig, from_cache: bool) -> None:
    """Ragged prompts, one of them with two samples, in any items and slots of the cache, computed
    either way. On the way a row is dropped, one is turned off in its place, and one takes a slot
    that came free."""
    model = scramble(LanguageModel(config)).trunk
    lengths, capacity = [3, 7, 1, 5], 6
    prompts = random_rows(lengths)
    prompt_of_row = [0, 1, 1, 2, 3, 3]
    rows = [prompts[p] + random_rows([capacity])[0] for p in prompt_of_row]
    full = [run_one(model, row) for row in rows]

    shape = CacheShape(num_slots=6, capacity=capacity, num_prompts=5, prompt_capacity=7)
    cache = KVCache(config, shape, model.dtype, model.device)
    items, slot_of_row = torch.tensor([2, 0, 4, 1]), [4, 0, 2, 5, 3, 0]
    cache.prompt_lengths[items] = torch.tensor(lengths)
    hidden = model.run(
        torch.tensor([token for row in prompts for token in row]),
        PrefillStep(Packing.of(lengths), cache, items, torch_product, from_cache=from_cache),
    )
    torch.testing.assert_close(hidden, run(model, prompts), rtol=1e-5, atol=1e-5)

    ages = dict.fromkeys(range(5), 0)  # completion tokens in the slot
    turned_off: set[int] = set()
    for step in range(capacity):
        if step == 2:
            del ages[1]
        if step == 3:
            turned_off.add(3)
            ages[5] = 0  # in the slot that row 1 had
        live = list(ages)
        at = [(row, lengths[prompt_of_row[row]] + ages[row]) for row in live]
        slots = [-1 if row in turned_off else slot_of_row[row] for row in live]
        before, places = cache.keys.nan_to_num(), torch.tensor(list(ages.values()))
        hidden = model.run(
            torch.tensor([rows[row][place] for row, place in at]),
            DecodeStep(
                cache,
                torch_product,
                slots=torch.tensor(slots),
                prompt_ids=items[torch.tensor([prompt_of_row[row] for row in live])],
                places=places,
                used=places + 1,
                positions=torch.tensor([place for _, place in at]),
            ),
        )
        for row, (_, place), got in zip(live, at, hidden, strict=True):
            if row not in turned_off:
                torch.testing.assert_close(
                    got, full[row][place], rtol=2e-5, atol=2e-5, msg=f"row {row} at step {step}"
                )
        written = (cache.keys.nan_to_num() != before).any(4).any(2).any(0).nonzero().tolist()
        expected = [[s, ages[row]] for row, s in zip(live, slots, strict=True) if s >= 0]
        assert written == sorted(expected), "a key a live row, and nothing else"
        ages = {row: age + (row not in turned_off) for row, age in ages.items()}
    assert ages == {0: 6, 2: 6, 3: 3, 4: 6, 5: 3}


@config_of_each_kind
def test_a_prompt_is_cached_once_for_all_its_samples(config: DecoderConfig) -> None:
    shape = CacheShape(num_slots=6, capacity=4, num_prompts=2, prompt_capacity=5)
    cache = KVCache(config, shape, torch.float32, torch.device("cpu"))
    numbers = config.num_layers * config.num_kv_heads * config.head_dim * 2
    assert cache.num_bytes == 4 * numbers * (2 * 5 + 6 * 4)
    assert shape.num_bytes(config, torch.float32) == cache.num_bytes
    assert shape.num_bytes(config, torch.bfloat16) == cache.num_bytes // 2


@config_of_each_kind
def test_recomputed_layers_give_the_same_gradients(config: DecoderConfig) -> None:
    model = scramble(LanguageModel(config))
    rows = random_rows([4, 9])
    results = []
    for checkpointing in (False, True):
        model.trunk.checkpointing = checkpointing
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = run(model, rows).square().sum()
        held = sum(saved)
        loss.backward()
        results.append((loss, gradients(model), held))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    assert results[1][2] < results[0][2] / 2


@config_of_each_kind
def test_lower_and_upper_are_the_whole(config: DecoderConfig) -> None:
    model = scramble(LanguageModel(config)).trunk
    rows = random_rows([4, 9])
    token_ids, packing = torch.tensor(sum(rows, [])), Packing.of([4, 9])  # noqa: RUF017
    step = PackedStep(packing)
    whole = run(model, rows)
    for cut in range(config.num_layers + 1):
        stream = model.lower(token_ids, step, cut)
        torch.testing.assert_close(model.upper(stream, step, cut), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_equals_its_definition(
    window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    packing = Packing.of([3, 17, 1])
    query = torch.randn(21, 4, 8, dtype=dtype)
    key, value = torch.randn(2, 21, 2, 8, dtype=dtype)
    out = packed_attention(query, key, value, packing, scale=0.3, window=window, softcap=softcap)
    q, k, v = (x.double() for x in (query, key, value))
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = packing.positions[:, None] - packing.positions
    visible = (packing.rows[:, None] == packing.rows) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.einsum("hij,jhd->ihd", weights, v)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_cpu_takes_sdpa_and_a_gpu_what_it_has() -> None:
    assert choice(torch.device("cpu"), torch.bfloat16)[0] == "sdpa"
    assert choice(torch.device("cuda"), torch.float32)[0] == "sdpa"
    assert choice(torch.device("cuda"), torch.bfloat16)[0] in ("varlen", "flash-attn")
    odd = choice(torch.device("cuda"), torch.bfloat16, head_dim=20)[0]
    assert odd in ("sdpa", "flash-attn"), "torch's kernel takes multiples of 8"


def test_a_sequence_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match="lengths must be positive"):
        Packing.of([3, 0])


def test_initialize_depends_on_its_seed_only() -> None:
    config = dataclasses.replace(CONFIGS["multi_head_untied_biased"], init_std=0.05)
    first, second, other = (ScalarModel(config) for _ in range(3))
    state = torch.get_rng_state()
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        model.initialize(seed)
    assert torch.equal(state, torch.get_rng_state())
    weights = first.state_dict()
    assert all(torch.equal(weights[name], t) for name, t in second.state_dict().items())
    assert not torch.equal(weights["score.weight"], other.state_dict()["score.weight"])
    assert torch.equal(weights["trunk.norm.weight"], torch.ones(config.hidden_size))
    assert weights["trunk.layers.0.attn.qkv_proj.bias"].abs().max() == 0
    embedding = weights["trunk.embed_tokens.weight"]
    assert embedding.std().item() == pytest.approx(config.init_std, rel=0.1)


@pytest.mark.parametrize("name", ["tiny", "small", "medium"])
def test_small_configurations_build(name: str) -> None:
    with torch.device("meta"):
        model = LanguageModel(small_config(name, vocab_size=100))
    assert model.output_weight.shape[0] == 100


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers must be positive"),
        ("num_kv_heads", 3, "multiple of num_kv_heads"),
        ("head_dim", 7, "rotary dimensions must be an even number"),
        ("rope", Rope(dim=10), "rotary dimensions must be an even number within head_dim"),
        ("window", 0, "window must be positive"),
        ("window_layers", (True,), "window_layers has 1 entries for 3 layers"),
    ],
)
def test_impossible_sizes_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GROUPED, **{field: value})

"""A model with adapters: where they are, on, off and merged, and that nothing else trains."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fuserl.model.config import DecoderConfig
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.lora import (
    adapters_off,
    add_lora,
    find_adapters,
    find_targets,
    merged,
)
from fuserl.model.packing import Packing

MakeModel = Callable[..., LanguageModel]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        "family": "gpt2",
        "rope": None,
        "norm": "layer",
        "gated_mlp": False,
        "num_kv_heads": 4,
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    "gpt_neox": {
        "family": "gpt_neox",
        "norm": "layer",
        "gated_mlp": False,
        "num_kv_heads": 4,
        "activation": "gelu",
        "parallel_residual": True,
        "tie_embeddings": False,
    },
}


def stir(model: nn.Module, seed: int = 8) -> None:
    """Make the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    for layer in find_adapters(model).values():
        for b in layer.lora_b:
            nn.init.normal_(b, std=0.2, generator=generator)


def run(model: LanguageModel | ScalarModel) -> Tensor:
    """The model on three packed sequences."""
    lengths = (5, 1, 9)
    token_ids = torch.randint(
        3, model.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(2)
    )
    out = model(token_ids, Packing.of(lengths))
    return model.logits(out) if isinstance(model, LanguageModel) else out


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_begin_as_nothing_and_are_off_bit_for_bit(
    make_model: MakeModel, family: str
) -> None:
    """Off, a model with adapters is the frozen copy of its start."""
    model = make_model(**FAMILIES[family])
    start = copy.deepcopy(model)
    add_lora(model, 3, 6.0, seed=1)
    assert torch.equal(run(model), run(start))
    stir(model)
    moved = run(model)
    assert not torch.allclose(moved, run(start), atol=0.1)
    with adapters_off(model):
        assert torch.equal(run(model), run(start))
        with adapters_off(model):
            pass
        assert torch.equal(run(model), run(start))
    assert torch.equal(run(model), moved)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(run(model), moved)


def test_only_adapters_train(make_model: MakeModel) -> None:
    model = make_model()
    add_lora(model, 3, 6.0, ["q_proj", "down_proj"])
    run(model).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {
        f"trunk.layers.{layer}.{name}"
        for layer in range(model.config.num_layers)
        for name in (
            *("attn.qkv_proj.lora_a", "attn.qkv_proj.lora_b.0"),
            *("mlp.down_proj.lora_a", "mlp.down_proj.lora_b.0"),
        )
    }
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_head_of_a_scalar_model_trains_with_them(
    make_scalar_model: Callable[..., ScalarModel],
) -> None:
    model = make_scalar_model()
    add_lora(model, 2, 4.0, "q_proj")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora" not in name} == {"score.weight", "score.bias"}


@pytest.mark.parametrize(
    ("family", "targets", "found"),
    [
        ("llama", "v_proj", {"model.layers.0.self_attn.v_proj": (48, 64)}),
        ("llama", "mlp.up_proj", {"model.layers.0.mlp.up_proj": (24, 48)}),
        ("gpt2", ["c_attn"], {"transformer.h.0.attn.c_attn": (0, 96)}),
        (
            "gpt2",
            ["c_proj"],
            {"transformer.h.0.attn.c_proj": (0, 16), "transformer.h.0.mlp.c_proj": (0, 16)},
        ),
        ("gpt2", ["attn.c_proj"], {"transformer.h.0.attn.c_proj": (0, 16)}),
        ("gpt_neox", "query_key_value", {"gpt_neox.layers.0.attention.query_key_value": (0, 96)}),
        (
            "gpt_neox",
            ["gpt_neox.layers.0.attention.dense"],
            {"gpt_neox.layers.0.attention.dense": (0, 16)},
        ),
    ],
)
def test_targets_are_ends_of_names(
    make_model: MakeModel, family: str, targets: Any, found: dict[str, tuple[int, int]]
) -> None:
    model = make_model(num_layers=1, **FAMILIES[family])
    add_lora(model, 2, 4.0, targets)
    segments = [s for layer in find_adapters(model).values() for s in layer.segments]
    assert {s.module: (s.start, s.stop) for s in segments} == found
    assert {(s.rank, s.alpha) for s in segments} == {(2, 4.0)}


def test_all_linear_is_every_product_of_the_layers(make_model: MakeModel) -> None:
    model = make_model()
    names = {name for name, m in model.trunk.layers.named_modules() if isinstance(m, nn.Linear)}
    add_lora(model, 2, 4.0, "all-linear")
    assert {name.removeprefix("trunk.layers.") for name in find_adapters(model)} == names
    for name, target in find_targets(make_model()).items():
        assert torch.equal(target.order.sort().values, torch.arange(target.stop - target.start))
        assert target.module == name


def test_the_seed_makes_the_adapters(make_model: MakeModel) -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = make_model()
        add_lora(model, 2, 4.0, seed=seed)
        drawn.append(
            torch.cat([m.lora_a.detach().flatten() for m in find_adapters(model).values()])
        )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].unique()) > 0.99 * len(drawn[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_plain_and_shares_the_rest(make_model: MakeModel, family: str) -> None:
    model = make_model(**FAMILIES[family])
    add_lora(
        model, 3, 6.0, ["dense", "mlp.dense_4h_to_h"] if family == "gpt_neox" else "all-linear"
    )
    stir(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    plain = merged(model)
    torch.testing.assert_close(run(plain), run(model), rtol=1e-4, atol=1e-5)
    fresh = LanguageModel(model.config)
    assert list(plain.state_dict()) == list(fresh.state_dict())
    assert all(p.requires_grad for p in plain.parameters())
    adapted = {f"{name}.weight" for name in find_adapters(model)}
    theirs = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        if "lora" not in name:
            assert (theirs[name].data_ptr() == p.data_ptr()) == (name not in adapted)
            assert not p.requires_grad


def test_a_merged_scalar_model_keeps_what_waits_in_it(make_model: MakeModel) -> None:
    model = ScalarModel.on_trunk(make_model(tie_embeddings=False), seed=1)
    add_lora(model, 3, 6.0)
    stir(model)
    plain = merged(model)
    torch.testing.assert_close(run(plain), run(model), rtol=1e-4, atol=1e-5)
    assert plain.kept_lm_head["lm_head.weight"] is model.kept_lm_head["lm_head.weight"]


def test_adapters_cost_what_their_rank_says_and_survive_checkpointing(
    make_model: MakeModel,
) -> None:
    """Gradients with activations computed again are the same bits."""
    found = []
    for checkpointing in (False, True):
        model = make_model()
        add_lora(model, 3, 6.0)
        stir(model)
        model.trunk.checkpointing = checkpointing
        run(model).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == sum(1 + len(m.lora_b) for m in find_adapters(model).values())
    for without, with_checkpointing in zip(*found, strict=True):
        assert torch.equal(without, with_checkpointing)


def test_what_makes_no_sense_is_refused(make_model: MakeModel, sizes: DecoderConfig) -> None:
    model = make_model()
    with pytest.raises(
        ValueError, match=r"targets names 'c_attn'.*\(known: q_proj, k_proj, v_proj"
    ):
        add_lora(model, 2, 4.0, ["q_proj", "c_attn"])
    with pytest.raises(ValueError, match="targets names 'lm_head', which is no product"):
        add_lora(model, 2, 4.0, "lm_head")
    with pytest.raises(ValueError, match="targets must name at least one module"):
        add_lora(model, 2, 4.0, [])
    with pytest.raises(ValueError, match="no adapters to switch off"), adapters_off(model):
        pass
    assert find_adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())
    add_lora(model, 2, 4.0)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, 2, 4.0)

    class Other(nn.Module):
        config = dataclasses.replace(sizes)

    with pytest.raises(ValueError, match="own decoder: Other has none"):
        add_lora(LanguageModel(sizes, Other()), 2, 4.0)  # type: ignore[arg-type]

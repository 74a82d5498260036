"""Model folders: bits survive, transformers agrees, heads find their places, and every fault in the
weights is named before anything is allocated. Each family against transformers is
test_families.py."""

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import (
    BIASED_HEAD,
    TIED,
    UNTIED,
    assert_same_bits,
    edit_json,
    edit_weights,
    language_model,
    load_in_transformers,
    reward_model,
)
from packed import run
from safetensors import safe_open
from safetensors.torch import save_file

from fuserl.model.config import DecoderConfig
from fuserl.model.folder import (
    check_vocabulary,
    is_reward_model,
    load_language_model,
    load_scalar_model,
    save_model,
)
from fuserl.model.heads import ScalarModel
from fuserl.model.weights import hf_state, load_hf_state

BOTH = pytest.mark.parametrize(
    "config", [TIED, UNTIED, BIASED_HEAD], ids=["tied", "untied", "biased head"]
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound folder of a tied language model."""
    save_model(language_model(TIED), tmp_path / "model")
    return tmp_path / "model"


# Bits


@BOTH
def test_language_model_round_trip(config: DecoderConfig, tmp_path: Path) -> None:
    model = language_model(config)
    save_model(model, tmp_path / "deep" / "folder")
    loaded = load_language_model(tmp_path / "deep" / "folder")
    assert loaded.config == model.config
    assert_same_bits(model, loaded)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@BOTH
def test_reward_model_round_trip(config: DecoderConfig, tmp_path: Path) -> None:
    model = reward_model(config)
    save_model(model, tmp_path)
    loaded, head_is_new = load_scalar_model(tmp_path)
    assert not head_is_new
    assert loaded.config == model.config
    assert_same_bits(model, loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = language_model(TIED)
    save_model(model, tmp_path, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype)[6:]
    assert_same_bits(load_language_model(tmp_path, dtype=None), model.to(dtype))
    assert_same_bits(load_language_model(tmp_path), model.to(dtype).float())


def test_weight_files_name_their_framework(tmp_path: Path) -> None:
    save_model(reward_model(TIED), tmp_path)
    for name in ("model.safetensors", "fuserl_head.safetensors"):
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_saving_in_an_integer_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype.*torch\.int8"):
        save_model(language_model(TIED), tmp_path, dtype=torch.int8)


def test_a_loaded_model_does_not_depend_on_its_file(saved: Path) -> None:
    model = load_language_model(saved)
    weights = saved / "model.safetensors"
    with weights.open("rb+") as file:
        file.write(b"\xff" * weights.stat().st_size)
    assert_same_bits(model, language_model(TIED))


# Heads


@BOTH
def test_a_language_model_gets_a_new_head(config: DecoderConfig, tmp_path: Path) -> None:
    model = language_model(config)
    save_model(model, tmp_path)
    first, head_is_new = load_scalar_model(tmp_path, head_seed=3)
    assert head_is_new
    assert torch.equal(first.trunk.embed_tokens.weight, model.trunk.embed_tokens.weight)
    assert first.score.weight.abs().max() > 0
    assert first.score.bias.item() == 0
    assert_same_bits(first, load_scalar_model(tmp_path, head_seed=3)[0])
    other, _ = load_scalar_model(tmp_path, head_seed=4)
    assert not torch.equal(first.score.weight, other.score.weight)


def test_a_tied_reward_folder_gives_a_language_model(tmp_path: Path) -> None:
    model = reward_model(TIED)
    save_model(model, tmp_path)
    loaded = load_language_model(tmp_path)
    assert torch.equal(loaded.output_weight, model.trunk.embed_tokens.weight)


def test_an_untied_reward_folder_from_scratch_has_no_language_model(tmp_path: Path) -> None:
    save_model(reward_model(UNTIED), tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors: lm_head\.weight \(40, 16\) is miss"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_reward_folder_keeps_the_head_of_its_starting_model(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Through two stages, and however its own weights moved."""
    from transformers import AutoModelForSequenceClassification

    start = language_model(UNTIED)
    save_model(start, tmp_path / "start")
    first, _ = load_scalar_model(tmp_path / "start", dtype=None)
    assert "lm_head.weight" not in first.state_dict()
    with torch.no_grad():
        first.trunk.norm.weight.mul_(2)
    save_model(first, tmp_path / "first")
    second, head_is_new = load_scalar_model(tmp_path / "first")
    assert not head_is_new
    save_model(copy.deepcopy(second), tmp_path / "second", dtype=dtype)
    back = load_language_model(tmp_path / "second", dtype=None)
    assert torch.equal(back.lm_head.weight, start.lm_head.weight.to(dtype))
    assert torch.equal(back.trunk.norm.weight, first.trunk.norm.weight.to(dtype))
    load_in_transformers(AutoModelForSequenceClassification, tmp_path / "second")


def test_the_weights_own_head_comes_before_one_left_by_a_kill(tmp_path: Path) -> None:
    save_model(language_model(UNTIED, seed=1), tmp_path)
    stale = {"lm_head.weight": language_model(UNTIED, seed=2).lm_head.weight.detach()}
    save_file(stale, tmp_path / "fuserl_head.safetensors")
    assert_same_bits(load_language_model(tmp_path), language_model(UNTIED, seed=1))


def test_saving_over_the_other_kind_leaves_nothing_of_it(tmp_path: Path) -> None:
    save_model(reward_model(TIED), tmp_path)
    save_model(language_model(TIED), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    save_model(reward_model(TIED), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "fuserl_head.safetensors",
        "model.safetensors",
    ]


def test_a_bias_without_its_head_is_an_error(saved: Path) -> None:
    save_file({"score.bias": torch.ones(1)}, saved / "fuserl_head.safetensors")
    with pytest.raises(ValueError, match=r"fuserl_head\.safetensors has score\.bias.*score\.weigh"):
        load_scalar_model(saved)


@BOTH
def test_a_mlp_head_is_kept_in_our_own_file(config: DecoderConfig, tmp_path: Path) -> None:
    start = language_model(config)
    save_model(start, tmp_path / "start")
    assert not is_reward_model(tmp_path / "start")
    model, head_is_new = load_scalar_model(tmp_path / "start", head="mlp", head_seed=4)
    assert head_is_new
    assert model.score_hidden is not None
    torch.nn.init.normal_(model.score_hidden.bias)
    save_model(model, tmp_path / "reward")
    with safe_open(tmp_path / "reward" / "model.safetensors", framework="pt") as file:
        assert not any("score" in name for name in file.keys())  # noqa: SIM118
    assert is_reward_model(tmp_path / "reward")
    back, head_is_new = load_scalar_model(tmp_path / "reward")  # its kind is in the folder
    assert not head_is_new
    assert_same_bits(back, model)
    assert_same_bits(load_language_model(tmp_path / "reward"), start)


def test_a_mlp_head_left_by_a_kill_is_an_error(tmp_path: Path) -> None:
    save_model(reward_model(TIED, head="mlp"), tmp_path)
    head = (tmp_path / "fuserl_head.safetensors").read_bytes()
    save_model(language_model(TIED), tmp_path)
    (tmp_path / "fuserl_head.safetensors").write_bytes(head)
    with pytest.raises(ValueError, match=r"fuserl_head\.safetensors has score.* two models"):
        load_scalar_model(tmp_path)


def test_the_bias_of_a_language_model_head_comes_through_a_reward_folder(tmp_path: Path) -> None:
    start = language_model(BIASED_HEAD)
    save_model(ScalarModel.on_trunk(start, seed=0), tmp_path / "reward")
    assert_same_bits(load_language_model(tmp_path / "reward"), start)
    model, _ = load_scalar_model(tmp_path / "reward")
    assert model.kept_lm_head.keys() == {"lm_head.weight", "lm_head_bias"}


# transformers


@BOTH
def test_transformers_opens_our_language_model(config: DecoderConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = language_model(config)
    save_model(ours, tmp_path / "ours")
    theirs = load_in_transformers(AutoModelForCausalLM, tmp_path / "ours")
    token_ids = torch.randint(config.vocab_size, (2, 9))
    with torch.no_grad():
        logits = ours.logits(run(ours, token_ids.tolist())).view(2, 9, -1)
        torch.testing.assert_close(logits, theirs(token_ids).logits, rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == config.eos_token_id
    assert theirs.generation_config.pad_token_id == config.pad_token_id

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_language_model(tmp_path / "theirs")
    assert back.config == ours.config
    assert_same_bits(ours, back)


@BOTH
def test_transformers_opens_our_reward_model(config: DecoderConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    ours = reward_model(dataclasses.replace(config, pad_token_id=0), bias=0.25)
    save_model(ours, tmp_path / "ours")
    theirs = load_in_transformers(AutoModelForSequenceClassification, tmp_path / "ours")
    assert theirs.config.num_labels == 1
    token_ids = torch.randint(1, config.vocab_size, (2, 9))
    with torch.no_grad():
        scores = theirs(token_ids).logits.squeeze(-1) + 0.25
        values = run(ours, token_ids.tolist()).view(2, 9)[:, -1]
        torch.testing.assert_close(values, scores, rtol=1e-5, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")  # without our bias file
    back, head_is_new = load_scalar_model(tmp_path / "theirs")
    assert not head_is_new
    assert back.score.bias.item() == 0
    with torch.no_grad():
        ours.score.bias.zero_()
    assert_same_bits(ours, back)


def test_transformers_opens_bfloat16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_model(language_model(TIED), tmp_path, dtype=torch.bfloat16)
    assert load_in_transformers(AutoModelForCausalLM, tmp_path).dtype == torch.bfloat16


# Faults in the weights


@pytest.fixture
def no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a fault must be found before the model is allocated")

    monkeypatch.setattr(torch.nn.Module, "to_empty", allocate)


Fault = tuple[Callable[[dict[str, torch.Tensor]], object], str]
WEIGHT_FAULTS: dict[str, Fault] = {
    "missing key": (
        lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"),
        r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight \(24, 16\) is missing",
    ),
    "wrong shape": (
        lambda weights: weights.update({"model.norm.weight": torch.ones(17)}),
        r"model\.safetensors: model\.norm\.weight has shape \(17,\).*makes it \(16,\)",
    ),
    "vocabulary": (
        lambda weights: weights.update({"model.embed_tokens.weight": torch.ones(39, 16)}),
        r"model\.embed_tokens\.weight has shape \(39, 16\).*\(40, 16\) \(vocab_size 40\)",
    ),
    "unexpected key": (
        lambda weights: weights.update({"model.layers.0.gate.weight": torch.ones(2, 3)}),
        r"model\.safetensors: model\.layers\.0\.gate\.weight \(2, 3\) is not a tensor of this",
    ),
    "quantised": (
        lambda weights: weights.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}),
        r"model\.safetensors: model\.norm\.weight has dtype I8 \(supported: F64, F32",
    ),
}


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("load", [load_language_model, load_scalar_model])
@pytest.mark.parametrize(("edit", "message"), WEIGHT_FAULTS.values(), ids=WEIGHT_FAULTS)
def test_wrong_weights(
    edit: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    load: Callable[[Path], object],
    saved: Path,
) -> None:
    edit_weights(saved, edit)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.usefixtures("no_allocation")
def test_many_problems_make_a_short_error(saved: Path) -> None:
    edit_json(saved / "config.json", hidden_size=32)
    with pytest.raises(ValueError) as caught:
        load_language_model(saved)
    lines = str(caught.value).splitlines()
    assert len(lines) < 10
    assert lines[-1].startswith("and ")


@pytest.mark.usefixtures("no_allocation")
def test_a_head_with_several_labels_is_refused(tmp_path: Path) -> None:
    save_model(reward_model(TIED), tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"score.weight": torch.ones(2, 16)}))
    with pytest.raises(ValueError, match=r"score\.weight has shape \(2, 16\).*\(1, 16\)"):
        load_scalar_model(tmp_path)


@pytest.mark.usefixtures("no_allocation")
def test_the_head_a_reward_model_keeps_must_fit(tmp_path: Path) -> None:
    save_model(language_model(UNTIED), tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.ones(39, 16)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(39, 16\).*vocab_size 40"):
        load_scalar_model(tmp_path)


def test_known_extra_tensors_are_ignored(saved: Path) -> None:
    edit_weights(
        saved,
        lambda weights: weights.update(
            {
                "lm_head.weight": torch.ones(40, 16),  # tied: transformers ignores it too
                "score.weight": torch.ones(7, 16),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    assert_same_bits(load_language_model(saved), language_model(TIED))


def test_masks_that_old_checkpoints_stored_are_ignored(tmp_path: Path) -> None:
    model = language_model(BIASED_HEAD)
    save_model(model, tmp_path)
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e9),
    }
    edit_weights(tmp_path, lambda weights: weights.update(masks))
    assert_same_bits(load_language_model(tmp_path), model)


@pytest.mark.parametrize("config", [TIED, BIASED_HEAD], ids=["llama", "gptj"])
def test_a_base_model_has_no_prefix(config: DecoderConfig, tmp_path: Path) -> None:
    model = language_model(config)
    save_model(model, tmp_path)

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.").removeprefix("transformer.")] = weights.pop(name)

    edit_weights(tmp_path, strip)
    assert_same_bits(load_language_model(tmp_path), model)
    assert torch.equal(load_scalar_model(tmp_path)[0].trunk.norm.weight, model.trunk.norm.weight)


def test_weights_in_memory_are_checked_as_a_folder_is() -> None:
    model = language_model(TIED)
    weights = {name: tensor.clone() for name, tensor in hf_state(model).items()}
    norm = weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(16,\) is missing"):
        load_hf_state(model, weights)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(15,\).*\(16,\)"):
        load_hf_state(model, weights | {"model.norm.weight": norm[1:]})


def test_vocabularies() -> None:
    check_vocabulary(TIED, 40, "a/folder")
    check_vocabulary(TIED, 30, "a/folder")  # padded to a round size
    with pytest.raises(ValueError, match=r"a/folder: the tokenizer has 41 tokens.* is 40"):
        check_vocabulary(TIED, 41, "a/folder")

"""Every family against transformers: configurations and weights there and back without a change,
the same logits and gradients, and folders that either side opens."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import run, run_one
from safetensors.torch import load_file
from tiny_models import FAMILY_MODELS, LENGTH, VOCAB_SIZE, build
from torch import Tensor

from fuserl.model.config_json import config_from_hf, config_to_hf
from fuserl.model.families import FAMILIES
from fuserl.model.folder import load_language_model, load_scalar_model, save_model
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.weights import hf_state, load_hf_state, pieces_of
from fuserl.policy import load_policy
from fuserl.tokenizer import Tokenizer

EVERY = pytest.mark.parametrize("name", FAMILY_MODELS)


def raw_config(theirs: Any) -> dict[str, Any]:
    """What save_pretrained writes to config.json."""
    content: dict[str, Any] = json.loads(theirs.config.to_json_string())
    return content


def ours_of(theirs: Any) -> LanguageModel:
    model = LanguageModel(config_from_hf(raw_config(theirs)))
    load_hf_state(model, theirs.state_dict())
    return model


def token_rows(seed: int = 0) -> Tensor:
    """Two rows, longer than every window and trained length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (2, LENGTH), generator=generator)


def our_logits(model: LanguageModel, rows: Tensor) -> Tensor:
    return model.logits(run(model, rows.tolist())).view(*rows.shape, -1)


def open_in_transformers(auto_class: Any, folder: Path) -> Any:
    model, info = auto_class.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def test_every_family_has_a_model() -> None:
    assert {name.split("-")[0] for name in FAMILY_MODELS} == FAMILIES.keys()


@EVERY
def test_a_configuration_goes_there_and_back(name: str) -> None:
    from transformers import AutoConfig

    theirs = FAMILY_MODELS[name]()
    raw = raw_config(theirs)
    ours = config_from_hf(raw)
    assert config_to_hf(ours) == raw
    written = json.loads(json.dumps(config_to_hf(dataclasses.replace(ours, source={}))))
    assert config_from_hf(written) == ours
    # What transformers makes of it decides the same model.
    again = AutoConfig.for_model(**written)
    assert config_from_hf(json.loads(again.to_json_string(use_diff=False))) == ours


@EVERY
def test_weights_go_there_and_back(name: str) -> None:
    theirs = FAMILY_MODELS[name]()
    model = ours_of(theirs)
    written = {key: tensor.clone() for key, tensor in hf_state(model).items()}
    again = LanguageModel(model.config)
    load_hf_state(again, written)
    assert_same_tensors(model.state_dict(), again.state_dict())
    assert sum(tensor.numel() for tensor in written.values()) == sum(
        parameter.numel() for parameter in theirs.parameters()
    )


@EVERY
def test_folders_of_either_side(name: str, tmp_path: Path) -> None:
    """Theirs in ours, in several files; ours in theirs, in one and in several."""
    from transformers import AutoModelForCausalLM

    theirs = FAMILY_MODELS[name]()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    ours = load_language_model(tmp_path / "theirs", dtype=None)
    rows = token_rows()
    with torch.no_grad():
        expected = theirs(rows).logits
        torch.testing.assert_close(our_logits(ours, rows), expected, rtol=1e-4, atol=1e-4)
    save_model(ours, tmp_path / "one")
    save_model(ours, tmp_path / "several", max_shard_bytes=20_000)
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) > 1
    for folder in (tmp_path / "one", tmp_path / "several"):
        back = open_in_transformers(AutoModelForCausalLM, folder)
        assert type(back) is type(theirs)
        assert_same_tensors(back.state_dict(), theirs.state_dict())
        assert back.generation_config.eos_token_id == theirs.generation_config.eos_token_id
        with torch.no_grad():
            assert torch.equal(back(rows).logits, expected)
        assert_same_tensors(load_language_model(folder).state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", ["mistral", "gemma", "gemma2", "gemma3_text", "gpt_neox"])
def test_folders_with_the_embeddings_tied_the_other_way(name: str, tmp_path: Path) -> None:
    """The other families have a model of each kind."""
    from transformers import AutoModelForCausalLM

    was_tied = FAMILY_MODELS[name]().config.tie_word_embeddings
    theirs = build(name, tie_word_embeddings=not was_tied)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_language_model(tmp_path / "theirs")
    assert ours.config.tie_embeddings != was_tied
    save_model(ours, tmp_path / "ours")
    back = open_in_transformers(AutoModelForCausalLM, tmp_path / "ours")
    assert_same_tensors(back.state_dict(), theirs.state_dict())
    rows = token_rows()
    with torch.no_grad():
        expected = back(rows).logits
        torch.testing.assert_close(our_logits(ours, rows), expected, rtol=1e-4, atol=1e-4)


@EVERY
def test_reward_folders_of_either_side(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    theirs = FAMILY_MODELS[name]()
    theirs.config.pad_token_id = 0
    start = ours_of(theirs)
    reward = ScalarModel.on_trunk(start, seed=3)
    with torch.no_grad():
        reward.score.weight.normal_()
    save_model(reward, tmp_path / "ours")
    classifier = open_in_transformers(AutoModelForSequenceClassification, tmp_path / "ours")
    rows = token_rows()
    with torch.no_grad():
        expected = classifier(rows).logits.squeeze(-1)
        ours = run(reward, rows.tolist()).view(rows.shape)[:, -1]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    # The language model comes back out of the reward model's folder.
    assert_same_tensors(load_language_model(tmp_path / "ours").state_dict(), start.state_dict())
    classifier.save_pretrained(tmp_path / "theirs")
    back, head_is_new = load_scalar_model(tmp_path / "theirs")
    assert not head_is_new
    assert_same_tensors(back.state_dict(), reward.state_dict())


@EVERY
def test_logits_and_gradients(name: str) -> None:
    theirs = FAMILY_MODELS[name]()
    ours = ours_of(theirs)
    rows = token_rows(1)
    weights = torch.randn(2, LENGTH, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    expected = theirs(rows).logits
    (expected * weights).sum().backward()
    logits = our_logits(ours, rows)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    (logits * weights).sum().backward()
    for their_name, gradient in hf_gradients(ours).items():
        wanted = gradient_by_name(theirs, their_name)
        scale = wanted.abs().max()
        assert scale > 0, their_name
        error = (gradient - wanted).abs()
        assert (error <= 1e-4 * (wanted.abs() + scale)).all(), (their_name, error.max(), scale)


def hf_gradients(model: LanguageModel) -> dict[str, Tensor]:
    """The gradients by transformers' names, in their layout."""
    parameters = dict(model.named_parameters())
    return {
        piece.name: piece.read(parameters[name].grad)
        for name, pieces in pieces_of(model).items()
        for piece in pieces
    }


def gradient_by_name(theirs: Any, name: str) -> Tensor:
    parameters = dict(theirs.named_parameters())
    name = name.replace("embed_out.", "lm_head.")
    return parameters[name].grad


@EVERY
def test_bfloat16_errs_no_more_than_transformers(name: str) -> None:
    theirs = FAMILY_MODELS[name]()
    ours = ours_of(theirs)
    rows = token_rows(3)
    with torch.no_grad():
        # The truth is of the rounded weights, in fp32.
        theirs = theirs.bfloat16()
        truth = copy.deepcopy(theirs).float()(rows).logits
        their_error = (theirs(rows).logits.float() - truth).norm()
        our_error = (our_logits(ours.bfloat16(), rows).float() - truth).norm()
    assert our_error <= 1.5 * their_error + 1e-3 * truth.norm()
    assert our_error > 0


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "gemma2", "gemma3_text"])
def test_windows_are_exercised(name: str) -> None:
    ours = ours_of(FAMILY_MODELS[name]())
    config = dataclasses.replace(ours.config, window=None, window_layers=None)
    wide = LanguageModel(config)
    wide.load_state_dict(ours.state_dict())
    row = token_rows()[0].tolist()
    with torch.no_grad():
        first, second = run_one(ours, row), run_one(wide, row)
    if ours.config.local_rope is None:
        torch.testing.assert_close(first[:5], second[:5])
    assert (first[8:] - second[8:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama-linear", "llama-llama3", "llama-yarn", "gemma3_text"])
def test_rope_scaling_is_exercised(name: str) -> None:
    ours = ours_of(FAMILY_MODELS[name]())
    assert ours.config.rope is not None
    rope = dataclasses.replace(ours.config.rope, scaling=None)
    plain = LanguageModel(dataclasses.replace(ours.config, rope=rope))
    plain.load_state_dict(ours.state_dict())
    row = token_rows()[0].tolist()
    with torch.no_grad():
        difference = run_one(ours, row) - run_one(plain, row)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "switch"),
    [("gemma2", "attention_softcap"), ("gemma2", "final_softcap"), ("gemma2", "attention_scale")],
)
def test_other_switches_are_exercised(name: str, switch: str) -> None:
    ours = ours_of(FAMILY_MODELS[name]())
    other = LanguageModel(dataclasses.replace(ours.config, **{switch: None}))
    other.load_state_dict(ours.state_dict())
    rows = token_rows()
    with torch.no_grad():
        difference = our_logits(ours, rows) - our_logits(other, rows)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama-biases", "gemma3_text", "gpt_neox"])
def test_a_policy_goes_back_out_as_it_came(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Every file of a transformers folder; ours adds fuserl.json alone."""
    source, out = tmp_path / "source", tmp_path / "out"
    theirs = build(name, vocab_size=tokenizer.vocab_size)
    theirs.generation_config.update(do_sample=True, temperature=0.6, eos_token_id=[2, 5])
    theirs.save_pretrained(source)
    tokenizer.save(source)
    config = source / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"a_key_of_theirs": {"b": [1]}}))
    load_policy(source, dtype=torch.float32).save(out)
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in source.iterdir()),
        "fuserl.json",
    }
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            assert_same_tensors(load_file(path), load_file(out / path.name))
        elif path.name in ("config.json", "generation_config.json"):
            assert json.loads(path.read_text()) == json.loads((out / path.name).read_text())
        else:
            assert path.read_bytes() == (out / path.name).read_bytes()

"""Adapters in files: PEFT reads ours and we read PEFT's, to the same logits; broken ones are
refused by file and key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILY_MODELS, LENGTH, VOCAB_SIZE
from torch import Tensor, nn

from fuserl.model.adapter_folder import load_adapter, save_adapter
from fuserl.model.config_json import config_from_hf
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.lora import add_lora, find_adapters
from fuserl.model.packing import Packing
from fuserl.model.weights import hf_state, load_hf_state
from fuserl.policy import Policy, load_policy

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["k_proj", "gate_proj", "o_proj"],
    "gemma": "all-linear",
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "gptj": ["q_proj", "out_proj", "fc_in"],
}
MakeModel = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="PEFT is an oracle: the extra `oracles` has it")


def ours_of(theirs: Any) -> LanguageModel:
    model = LanguageModel(config_from_hf(theirs.config.to_dict()))
    load_hf_state(model, theirs.state_dict())
    return model


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(8)
    for layer in find_adapters(model).values():
        for b in layer.lora_b:
            nn.init.normal_(b, std=0.1, generator=generator)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    token_ids = torch.randint(3, VOCAB_SIZE, (LENGTH,), generator=torch.Generator().manual_seed(1))
    if isinstance(model, LanguageModel):
        return model.logits(model(token_ids, Packing.of([LENGTH])))
    return model(token_ids[None]).logits[0]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", TARGETS)
def test_peft_reads_our_adapter(peft: Any, tmp_path: Path, family: str) -> None:
    theirs = FAMILY_MODELS[family]()
    ours = ours_of(theirs)
    before = logits(ours)
    add_lora(ours, 3, 5.0, TARGETS[family], rslora=family == "qwen2")
    stir(ours)
    save_adapter(ours, tmp_path, base="a/base")
    if family == "gpt2":
        assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    found = logits(peft.PeftModel.from_pretrained(theirs, tmp_path))
    assert_same(logits(ours), found)
    assert float((found - before).abs().max()) > 0.05 * float(before.abs().max())


@pytest.mark.parametrize("family", TARGETS)
def test_we_read_pefts_adapter(peft: Any, tmp_path: Path, family: str) -> None:
    """With other ranks and alphas for some modules, and a dropout that training alone has."""
    theirs = FAMILY_MODELS[family]()
    ours = ours_of(theirs)
    targets = TARGETS[family]
    first = "down_proj" if isinstance(targets, str) else targets[0]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        lora_dropout=0.3,
        use_rslora=family == "gpt2",
        target_modules=targets,
        rank_pattern={first: 2},
        alpha_pattern={rf"0\..*{first}": 9},
        init_lora_weights=False,
        fan_in_fan_out=family == "gpt2",
    )
    adapted = peft.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_same(logits(ours), logits(adapted))
    segments = [s for layer in find_adapters(ours).values() for s in layer.segments]
    assert {s.rank for s in segments} == {2, 4}
    assert {s.alpha for s in segments} == {6.0, 9.0}


def test_what_we_save_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Written again it is the same file; loading freezes the rest."""
    theirs = FAMILY_MODELS["gpt_neox"]()
    first = ours_of(theirs)
    add_lora(first, 3, 5.0)
    stir(first)
    save_adapter(first, tmp_path / "a")
    second = ours_of(theirs)
    load_adapter(second, tmp_path / "a")
    assert torch.equal(logits(first), logits(second))
    save_adapter(second, tmp_path / "b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    trained = {name for name, p in second.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in second.named_parameters() if "lora" in name}


def test_the_adapter_of_a_reward_model_has_its_head(peft: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    trunk = ours_of(FAMILY_MODELS["llama"]())
    model = ScalarModel.on_trunk(trunk, seed=1)
    config = FAMILY_MODELS["llama"]().config
    config.num_labels, config.pad_token_id = 1, 0
    theirs = AutoModelForSequenceClassification.from_config(config).eval()
    theirs.load_state_dict({**hf_state(model), "score.weight": torch.zeros(1, config.hidden_size)})
    add_lora(model, 2, 4.0, "q_proj")
    stir(model)
    save_adapter(model, tmp_path)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path)
    token_ids = torch.arange(3, 20)
    with torch.no_grad():
        ours = model(token_ids, Packing.of([len(token_ids)]))[-1] - model.score.bias[0]
        torch.testing.assert_close(adapted(token_ids[None]).logits[0, 0], ours)
        again = ScalarModel.on_trunk(trunk, seed=2)
        load_adapter(again, tmp_path)
        found = again(token_ids, Packing.of([len(token_ids)]))[-1] - again.score.bias[0]
    assert torch.equal(found, ours)
    with pytest.raises(ValueError, match=r"adapter_config.json: modules_to_save \['score'\]"):
        load_adapter(trunk, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of the tiny Llama on q_proj, rank 2."""
    model = ours_of(FAMILY_MODELS["llama"]())
    add_lora(model, 2, 4.0, "q_proj")
    stir(model)
    save_adapter(model, tmp_path)
    return tmp_path


def set_key(folder: Path, key: str, value: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "LOHA", "peft_type must be 'LORA', not 'LOHA'"),
        ("use_dora", True, "use_dora True is not supported"),
        ("bias", "all", "bias 'all' is not supported"),
        ("lora_bias", True, "lora_bias True is not supported"),
        ("modules_to_save", ["lm_head"], r"modules_to_save \['lm_head'\] is not supported"),
        ("layer_replication", [[0, 2]], "layer_replication .* is not supported"),
        ("something_new", 3, "something_new 3 is not supported"),
        ("init_lora_weights", "pissa", "init_lora_weights 'pissa' changes the base model"),
        ("r", "2", "r must be int, not '2'"),
        ("r", 0, "the rank of model.layers.0.self_attn.q_proj must be positive, not 0"),
        ("lora_alpha", True, "lora_alpha must be int or float, not True"),
        ("rank_pattern", {"q_proj": 2.5}, "rank_pattern"),
        ("rank_pattern", {"(": 2}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": "a"}, "alpha_pattern"),
    ],
)
def test_a_configuration_we_do_not_compute_is_refused(
    folder: Path, key: str, value: Any, message: str
) -> None:
    set_key(folder, key, value)
    model = ours_of(FAMILY_MODELS["llama"]())
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        load_adapter(model, folder)
    assert find_adapters(model) == {}


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: torch.zeros(3, 24)}, rf"{A} has shape \(3, 24\), but rank 2 .* \(2, 24\)"),
        ({A: torch.zeros(2, 23)}, rf"{A} has shape \(2, 23\)"),
        ({B: torch.zeros(25, 2)}, rf"{B} has shape \(25, 2\), .* \(24, 2\)"),
        ({B: None}, f"{B} is missing"),
        ({A: torch.zeros(2, 24, dtype=torch.int8)}, f"{A} has dtype torch.int8"),
        (
            {A.replace(".1.", ".2."): torch.zeros(2, 24)},
            r"layers.2.self_attn.q_proj.lora_A.weight is for a module that is no product",
        ),
        (
            {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 24)},
            "lm_head.lora_A.weight is for a module that is no product",
        ),
        (
            {A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(24)},
            "lora_magnitude_vector is no tensor of a plain low-rank adapter",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    folder: Path, change: dict[str, Tensor | None], message: str
) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: t for name, t in tensors.items() if t is not None}, path)
    model = ours_of(FAMILY_MODELS["llama"]())
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: .*{message}"):
        load_adapter(model, folder)
    assert find_adapters(model) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_files_that_are_none_are_refused(folder: Path) -> None:
    model = ours_of(FAMILY_MODELS["llama"]())
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is truncated"):
        load_adapter(model, folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors"):
        load_adapter(model, folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle"):
        load_adapter(model, folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        load_adapter(model, folder)


def test_there_must_be_something_to_save(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(make_model(), tmp_path)
    model = ScalarModel(make_model().config, "mlp")
    add_lora(model, 2, 4.0)
    with pytest.raises(ValueError, match="no place for a head of two layers"):
        save_adapter(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_with_adapters_is_saved_merged(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    add_lora(policy.model, 2, 4.0)
    stir(policy.model)
    policy.save(tmp_path)
    ours, again = policy.logprobs([[5, 6]], [[7, 8]]), load_policy(tmp_path)
    torch.testing.assert_close(again.logprobs([[5, 6]], [[7, 8]]), ours, rtol=1e-4, atol=1e-5)
    assert find_adapters(policy.model) != {}
    assert find_adapters(again.model) == {}


def test_only_the_modules_with_adapters_are_named(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    add_lora(model, 2, 4.0, ["layers.0.self_attn.q_proj", "up_proj"])
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["0.self_attn.q_proj", "up_proj"]

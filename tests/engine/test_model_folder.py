"""Model folders: bits survive, transformers agrees, and every fault is named before anything
is allocated."""

import copy
import dataclasses
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fuserl.model import folder as folders
from fuserl.model.config import SMALL_NAMES, DecoderConfig
from fuserl.model.folder import (
    FolderNotes,
    check_vocabulary,
    load_config,
    load_language_model,
    load_scalar_model,
    read_notes,
    resolve_folder,
    save_model,
    write_notes,
)
from fuserl.model.heads import LanguageModel, ScalarModel

TIED = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    bos_token_id=1,
    eos_token_id=2,
)
UNTIED = dataclasses.replace(
    TIED, tie_embeddings=False, attention_bias=True, head_dim=12, pad_token_id=0
)
BOTH = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


def language_model(config: DecoderConfig, seed: int = 0) -> LanguageModel:
    model = LanguageModel(dataclasses.replace(config, init_std=0.3))
    model.initialize(seed)
    return model


def reward_model(config: DecoderConfig, bias: float = 0.25) -> ScalarModel:
    model = ScalarModel(dataclasses.replace(config, init_std=0.3))
    model.initialize(0)
    model.initialize_head(1)
    with torch.no_grad():
        model.score.bias.fill_(bias)
    return model


def assert_same_bits(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound folder of a tied language model."""
    save_model(language_model(TIED), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder in several weight files, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**TIED.to_hf()))
    model.save_pretrained(tmp_path / "sharded", max_shard_size=3000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    return tmp_path / "sharded"


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
    assert torch.equal(first.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert first.score.weight.abs().max() > 0
    assert first.score.bias.item() == 0
    assert_same_bits(first, load_scalar_model(tmp_path, head_seed=3)[0])
    other, _ = load_scalar_model(tmp_path, head_seed=4)
    assert not torch.equal(first.score.weight, other.score.weight)


def test_a_tied_reward_folder_gives_a_language_model(tmp_path: Path) -> None:
    model = reward_model(TIED)
    save_model(model, tmp_path)
    loaded = load_language_model(tmp_path)
    assert torch.equal(loaded.output_weight, model.model.embed_tokens.weight)


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
        first.model.norm.weight.mul_(2)
    save_model(first, tmp_path / "first")
    second, head_is_new = load_scalar_model(tmp_path / "first")
    assert not head_is_new
    save_model(copy.deepcopy(second), tmp_path / "second", dtype=dtype)
    back = load_language_model(tmp_path / "second", dtype=None)
    assert torch.equal(back.lm_head.weight, start.lm_head.weight.to(dtype))
    assert torch.equal(back.model.norm.weight, first.model.norm.weight.to(dtype))
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


# transformers


def load_in_transformers(auto_class: Any, folder: Path) -> Any:
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


@BOTH
def test_transformers_opens_our_language_model(config: DecoderConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = language_model(config)
    save_model(ours, tmp_path / "ours")
    theirs = load_in_transformers(AutoModelForCausalLM, tmp_path / "ours")
    token_ids = torch.randint(config.vocab_size, (2, 9))
    with torch.no_grad():
        logits = ours(token_ids) @ ours.output_weight.T
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
        torch.testing.assert_close(ours.values(token_ids)[:, -1], scores, rtol=1e-5, atol=1e-5)

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


def test_a_sharded_folder_loads(sharded: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    ours = load_language_model(sharded).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert load_scalar_model(sharded)[1]


def test_saving_over_a_sharded_folder_takes_its_place(sharded: Path) -> None:
    model = language_model(TIED, seed=5)
    save_model(model, sharded)
    assert not (sharded / "model.safetensors.index.json").exists()
    assert_same_bits(load_language_model(sharded), model)


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


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("size", [0, 5, 300, -1], ids=["empty", "length", "header", "data"])
def test_truncated_weights(size: int, saved: Path) -> None:
    path = saved / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors"):
        load_language_model(saved)


@pytest.mark.usefixtures("no_allocation")
def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} \(with model\.") as caught:
        load_language_model(sharded)
    assert str(sharded) in str(caught.value)


@pytest.mark.usefixtures("no_allocation")
def test_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_a_shard_that_lacks_what_the_index_promises(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    weights = load_file(shard)
    key, _ = weights.popitem()
    save_file(weights | {"lm_head.weight": torch.ones(1)}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name}: {key} is missing, though .*index\.json"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_a_tensor_in_two_shards_is_an_error(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match=rf"is both in .*{first.name} and in .*{second.name}"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
def test_a_broken_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match=r"index\.json: weight_map"):
        load_language_model(sharded)


@pytest.mark.usefixtures("no_allocation")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_pickle_weights_are_refused(name: str, saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / name)
    with pytest.raises(ValueError, match=rf"{name} is a pickle.*refused; convert.*safetensors"):
        load_language_model(saved)


def test_pickle_weights_beside_safetensors_are_left_alone(saved: Path) -> None:
    (saved / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert_same_bits(load_language_model(saved), language_model(TIED))


@pytest.mark.usefixtures("no_allocation")
def test_no_weights_at_all(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*index\.json"):
        load_language_model(saved)


# Faults in config.json


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map is refused: .*code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is refused"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope type 'llama3'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope type 'linear'"),
        ({"hidden_size": "16"}, "hidden_size must be int, not '16'"),
        ({"head_dim": 8.5}, r"head_dim must be int or null, not 8\.5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"num_key_value_heads": -1}, "num_key_value_heads must be positive"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str, saved: Path) -> None:
    edit_json(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=r"config\.json: .*" + message) as caught:
        load_config(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(("listed", "kept"), [([2, 5], 2), ([], None)])
def test_of_several_eos_tokens_the_first_is_kept(
    listed: list[int], kept: int | None, saved: Path
) -> None:
    edit_json(saved / "config.json", eos_token_id=listed)
    assert load_config(saved).eos_token_id == kept


def test_a_config_without_a_key(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    del config["num_hidden_layers"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: key 'num_hidden_layers' is missing"):
        load_config(saved)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": ,\n}', r"config\.json:2: not JSON"),
        (b"[1]", r"config\.json: a JSON object is expected, not list"),
        (b"\xff\xfe", r"config\.json: not JSON"),
    ],
)
def test_a_config_that_is_not_json(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path)


def test_vocabularies() -> None:
    check_vocabulary(TIED, 40, "a/folder")
    check_vocabulary(TIED, 30, "a/folder")  # padded to a round size
    with pytest.raises(ValueError, match=r"a/folder: the tokenizer has 41 tokens.* is 40"):
        check_vocabulary(TIED, 41, "a/folder")


# Interrupted saves


INTERRUPTED_SAVE = """
import os, signal, sys
from pathlib import Path
from fuserl.model import folder
from fuserl.model.config import small_config
from fuserl.model.heads import LanguageModel

write = folder.save_file
def write_half(tensors, path, metadata):
    write(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

folder.save_file = write_half
assert "transformers" not in sys.modules and "huggingface_hub" not in sys.modules
folder.save_model(LanguageModel(small_config("tiny")), sys.argv[1])
"""


def test_a_save_killed_in_the_middle_leaves_the_old_weights(saved: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_SAVE, str(saved)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert_same_bits(load_language_model(saved), language_model(TIED))
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(os.listdir(saved)) > names  # what the kill left
    save_model(language_model(TIED, seed=1), saved)
    assert set(os.listdir(saved)) == names


def test_a_save_that_fails_leaves_the_old_weights(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_some(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    before = sorted(os.listdir(saved))
    monkeypatch.setattr(folders, "save_file", write_some)
    with pytest.raises(OSError, match="no space left"):
        save_model(language_model(TIED, seed=1), saved)
    assert sorted(os.listdir(saved)) == before
    assert_same_bits(load_language_model(saved), language_model(TIED))


def test_a_first_save_that_fails_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(folders, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_model(language_model(TIED), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_language_model(tmp_path / "new")


def test_files_are_as_readable_as_any_other(saved: Path) -> None:
    (saved / "other").touch()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert set(modes.values()) == {modes["other"]}


# Finding a folder


def test_an_existing_folder_is_taken_as_it_is(saved: Path) -> None:
    assert resolve_folder(saved) == saved
    assert resolve_folder(str(saved)) == saved


def test_a_file_is_no_model(saved: Path) -> None:
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file"):
        resolve_folder(saved / "config.json")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "a/b/c", "/a/b", "~/a", Path("a/b")])
def test_what_cannot_be_on_the_hub_is_not_looked_up(
    name: str | Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(FileNotFoundError, match=r"no such folder.*no hub id.*tiny, small, medium"):
        resolve_folder(name)


@pytest.mark.parametrize("name", SMALL_NAMES)
def test_names_of_small_configurations_are_for_sft(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="only sft trains from scratch"):
        resolve_folder(name)


def test_a_hub_id_is_downloaded_without_pickles_and_code(
    monkeypatch: pytest.MonkeyPatch, saved: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    published = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "fuserl.json",
        "fuserl_head.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    ]
    refused = [
        "pytorch_model.bin",
        "modeling_x.py",
        "consolidated.safetensors",
        "original/model.safetensors",
        "onnx/config.json",
        "README.md",
    ]

    def download(name: str, **patterns: list[str]) -> str:
        assert name == "org/name-1.5"
        assert list(filter_repo_objects(published + refused, **patterns)) == published
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_folder("org/name-1.5") == saved


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'org/absent'.*no such folder.*hub.*tiny, small"):
        resolve_folder("org/absent")


# Notes


def test_notes_round_trip(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == FolderNotes()
    notes = FolderNotes(prompt_template="Synopsis: {prompt}\n\nTitle — ")
    write_notes(notes, tmp_path / "new")
    assert read_notes(tmp_path / "new") == notes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt_templat": "{prompt}"}, "unknown key 'prompt_templat' .*known: prompt_template"),
        ({"prompt_template": 3}, "prompt_template must be a text"),
        ({"prompt_template": "no place"}, "prompt_template must be a text with {prompt}"),
        ({"prompt_template": "{prompt}, {prompt}"}, "prompt_template .* exactly once"),
    ],
)
def test_notes_that_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "fuserl.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"fuserl\.json: " + message):
        read_notes(tmp_path)

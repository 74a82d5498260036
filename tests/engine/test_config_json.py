"""config.json: every spelling is read, what this decoder lacks is refused by key and value, and
what a run does not change goes back unchanged."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import TIED, edit_json, language_model

from fuserl.model.config import DecoderConfig, Rope, RopeScaling
from fuserl.model.config_json import TOKEN_IDS, config_from_hf, config_to_hf, load_config
from fuserl.model.entries import OLD_ROPE_KEYS, UnsupportedModel
from fuserl.model.families import FAMILIES
from fuserl.model.folder import load_language_model, save_model
from fuserl.model.rotary import frequencies_of


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sound folder of a tied language model."""
    save_model(language_model(TIED), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map is refused: .*code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is refused"),
        ({"hidden_size": "16"}, "hidden_size must be int, not '16'"),
        ({"head_dim": 8.5}, r"head_dim must be int or null, not 8\.5"),
        ({"num_attention_heads": 0}, "num_attention_heads must be positive"),
        ({"num_attention_heads": None}, "num_attention_heads must be int, not None"),
        ({"num_key_value_heads": -1}, "num_key_value_heads must be positive"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be bool or null, not 1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be int or list or null, not '</s>'"),
        ({"rope_parameters": [1]}, r"rope_parameters must be dict or null, not \[1\]"),
        ({"rope_parameters": {"rope_type": "linear"}}, "type 'linear' have no 'factor'"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta must be int or float, not 'big'"),
        (
            {"rope_parameters": {"rope_theta": -1.0}},
            "rope_theta must be finite and positive, not -1.0",
        ),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be finite and not negative"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite and not negative"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            "factor of the rope parameters must be finite and positive, not 0",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1}},
            "type 'llama3' have no 'high_freq_factor'",
        ),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str, saved: Path) -> None:
    edit_json(saved / "config.json", **changes)
    with pytest.raises(ValueError, match=r"config\.json: .*" + message) as caught:
        load_config(saved)
    assert str(saved) in str(caught.value)
    assert not isinstance(caught.value, UnsupportedModel)


WINDOWED = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8}
TYPES = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "mamba"}, r"model_type 'mamba' .*supported: llama, mistral"),
        ("llama", {"model_type": "smollm3"}, "model_type 'smollm3'"),
        ("llama", {"model_type": None}, "model_type None"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act 'relu2' .*'silu'"),
        ("llama", {"hidden_act": ["silu"]}, r"hidden_act \['silu'\]"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        ("mistral", {"layer_types": TYPES}, "layer_types .*full_attention"),
        ("qwen2", WINDOWED | {"layer_types": ["chunked", TYPES[0]]}, "layer_types 'chunked'"),
        ("qwen2", {"layer_types": TYPES}, "'sliding_attention' without a sliding_window"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"hidden_activation": "gelu_fast"}, "hidden_activation 'gelu_fast'"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}, "attn_logit_softcapping 2.0"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.26}}, "0.26 .* odd"),
        ("gptj", {"rotary_dim": None}, "rotary_dim None"),
        ("llama", {"head_dim": 320}, "head_dim 320 .*up to 256"),
        ("gpt2", {"n_head": 8}, "head_dim 3 .*even"),
    ],
)
def test_what_this_decoder_lacks_is_unsupported(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        config_from_hf(minimal(family) | changes)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama", "rope_theta"),
        ("gpt_neox", "rotary_emb_base"),
        ("gemma3_text", "rope_local_base_freq"),
    ],
)
def test_no_frequency_has_the_base_0(family: str, key: str) -> None:
    content = minimal(family) | {"rotary_pct": 0.5}
    with pytest.raises(ValueError, match="rope_theta must be finite and positive, not 0"):
        config_from_hf(content | {key: 0})
    assert config_from_hf(content | {key: None}) == config_from_hf(content)


def test_a_soft_cap_is_positive() -> None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        with pytest.raises(ValueError, match=f"{key} must be finite and positive, not 0"):
            config_from_hf(minimal("gemma2") | {key: 0.0})


def minimal(family: str) -> dict[str, Any]:
    """The sizes alone, as an old folder may have them."""
    if family in ("gpt2", "gptj"):
        sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 40, "num_key_value_heads": 1}
    return {"model_type": family, "vocab_size": 97, **sizes}


YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("family", "content", "fields"),
    [
        ("llama", {}, {"rope": Rope(), "norm_eps": 1e-6, "tie_embeddings": False, "head_dim": 12}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": None}, {"rope": Rope(theta=5e5)}),
        (
            "llama",
            {"rope_theta": 10, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope": Rope(theta=10.0, scaling=RopeScaling(kind="linear", factor=2.0))},
        ),
        (
            "llama",
            {"rope_scaling": YARN},
            {"rope": Rope(scaling=RopeScaling(kind="yarn", factor=4.0, original_max_positions=16))},
        ),
        ("mistral", {"sliding_window": None}, {"window": None}),
        ("mistral", {}, {"window": 4096, "window_layers": None}),
        ("qwen2", {"sliding_window": 9, "use_sliding_window": False}, {"window": None}),
        ("qwen2", WINDOWED, {"window": 8, "window_layers": (False, True), "qkv_bias": True}),
        ("qwen3", {}, {"head_dim": 128, "qk_norm": True, "qkv_bias": False}),
        ("gemma", {"hidden_act": "gelu"}, {"activation": "gelu_tanh", "head_dim": 256}),
        ("gemma2", {}, {"window_layers": (True, False), "attention_softcap": 50.0}),
        ("gemma2", {"attn_logit_softcapping": None}, {"attention_softcap": None}),
        ("gemma2", {"query_pre_attn_scalar": 144}, {"attention_scale": 144**-0.5}),
        (
            "gemma3_text",
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2},
            {"rope": Rope(theta=1e6), "local_rope": Rope(), "window_layers": (True, False)},
        ),
        ("gpt2", {"n_inner": None}, {"intermediate_size": 96, "rope": None, "head_dim": 12}),
        ("gpt2", {"scale_attn_weights": False}, {"attention_scale": 1.0}),
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 100},
            {"rope": Rope(theta=100.0, dim=6), "qkv_bias": True},
        ),
        ("gpt_neox", {"rotary_pct": 1.0, "use_parallel_residual": False}, {"rope": Rope()}),
        ("gptj", {"rotary_dim": 8}, {"rope": Rope(dim=8, interleaved=True), "head_bias": True}),
    ],
)
def test_older_spellings(family: str, content: dict[str, Any], fields: dict[str, Any]) -> None:
    raw = minimal(family) | content
    config = config_from_hf(raw)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config_to_hf(config) == raw
    assert config_from_hf(config_to_hf(dataclasses.replace(config, source={}))) == config
    # transformers' defaults and reading of old keys make the same model of it.
    from transformers import AutoConfig

    theirs = config_from_hf(AutoConfig.for_model(**copy.deepcopy(raw)).to_dict())
    ids = dict.fromkeys(TOKEN_IDS)  # absent here; transformers has defaults
    assert dataclasses.replace(theirs, **ids) == config


@pytest.mark.parametrize(
    "content",
    [
        {"rope_theta": 5e5},
        {"rope_scaling": YARN},
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}},
        {"rope_parameters": {"rope_type": "default"}},
    ],
)
def test_old_rotary_spellings_mean_what_transformers_reads(content: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = minimal("llama") | {"max_position_embeddings": 64} | content
    ours = config_from_hf(raw).rope
    assert ours is not None
    theirs = AutoConfig.for_model(**raw)
    frequencies, factor = frequencies_of(ours, 12)
    assert theirs.rope_parameters["rope_theta"] == ours.theta
    if (kind := theirs.rope_parameters["rope_type"]) != "default":
        expected, attention_factor = ROPE_INIT_FUNCTIONS[kind](theirs)
        torch.testing.assert_close(frequencies, expected)
        assert factor == pytest.approx(attention_factor)


JUNK = [None, -1, 0, 1, 7, 2.5, float("nan"), "x", True, [], [1], [{}], {}, {"full_attention": 3}]


@pytest.mark.parametrize("family", FAMILIES)
def test_junk_at_any_key_is_a_value_error(family: str) -> None:
    """Never another error; and what is read is a configuration."""
    raw = minimal(family) | {"rotary_pct": 0.5, "rotary_dim": 4}
    keys = {*config_to_hf(dataclasses.replace(config_from_hf(raw), source={})), *OLD_ROPE_KEYS}
    keys |= {"layer_types", "sliding_window_pattern", "max_window_layers", "use_sliding_window"}
    num_refused = 0
    for key in keys:
        for junk in JUNK:
            try:
                assert isinstance(config_from_hf(raw | {key: junk}), DecoderConfig)
            except ValueError:
                num_refused += 1
    assert num_refused > len(keys)


def test_only_what_has_changed_is_written_anew() -> None:
    raw = minimal("llama") | {"rope_theta": 5e5, "eos_token_id": [2, 5], "our_own_key": [1, {}]}
    config = config_from_hf(raw)
    changed = dataclasses.replace(config, vocab_size=99, pad_token_id=3)
    assert config_to_hf(changed) == raw | {"vocab_size": 99, "pad_token_id": 3}
    changed = dataclasses.replace(config, eos_token_id=7)
    assert config_to_hf(changed) == raw | {"eos_token_id": 7}
    longer = config_to_hf(dataclasses.replace(config, rope=Rope(theta=1e6)))
    assert "rope_theta" not in longer
    assert longer["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_softcap": 3.0}, r"a llama model cannot say attention_softcap 3\.0.* as None"),
        ({"window": 4}, r"windows \[4, 4\]"),
        ({"qkv_bias": True}, "output_bias False"),
        ({"rope": None}, "ropes"),
        ({"family": "mamba"}, "no family 'mamba'"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_to_hf(dataclasses.replace(TIED, **changes))


def test_spellings_of_the_same_are_one() -> None:
    windowed = {"window": 4, "window_layers": (True, True), "num_kv_heads": 2}
    assert config_to_hf(dataclasses.replace(TIED, family="mistral", **windowed))
    rope = dataclasses.replace(Rope(), dim=TIED.head_dim)
    assert config_to_hf(dataclasses.replace(TIED, rope=rope, attention_scale=TIED.scale))


def test_generation_config_is_kept_and_its_ids_follow(tmp_path: Path) -> None:
    save_model(language_model(TIED), tmp_path)
    generation = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 5], "bos_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = load_language_model(tmp_path)
    save_model(model, tmp_path / "kept")
    path = tmp_path / "kept" / "generation_config.json"
    assert json.loads(path.read_text()) == generation
    model.trunk.config = dataclasses.replace(model.config, eos_token_id=7, pad_token_id=0)
    save_model(model, tmp_path / "kept")
    assert json.loads(path.read_text()) == generation | {"eos_token_id": 7, "pad_token_id": 0}


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

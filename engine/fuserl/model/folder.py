"""Hugging Face folders in and out: config.json, safetensors weights, and our own notes.

Everything a folder can have wrong is found before a weight is allocated: the names, shapes and
dtypes in the safetensors headers are compared with the model built on the meta device, and the
error names the file and the key. Nothing in a folder is ever executed: pickle weights and
remote code are refused.

Beside the files transformers knows, a folder may hold two of ours: `fuserl_head.safetensors`,
what transformers has no place for in a reward model (the bias of the scalar head, and the
language-model head its starting model had, where that is not the embeddings), and
`fuserl.json`, what to know about the model that is in no other file (FolderNotes).
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fuserl.model.config import SMALL_NAMES, DecoderConfig
from fuserl.model.decoder import Decoder
from fuserl.model.heads import LanguageModel, ScalarModel

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEAD_FILE = "fuserl_head.safetensors"
NOTES_FILE = "fuserl.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = [
    "*.json",
    "model*.safetensors",
    HEAD_FILE,
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
]
_PICKLE_PATTERNS = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")

_FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_HEADS = {"lm_head.weight", "score.weight", "score.bias"}
_MAX_PROBLEMS = 6  # lines in one error; a wrong config gives one a tensor

_CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    "vocab_size": (int,),
    "hidden_size": (int,),
    "intermediate_size": (int,),
    "num_hidden_layers": (int,),
    "num_attention_heads": (int,),
    "num_key_value_heads": (int, NoneType),
    "head_dim": (int, NoneType),
    "max_position_embeddings": (int,),
    "rope_theta": (int, float),
    "rope_parameters": (dict, NoneType),
    "rope_scaling": (dict, NoneType),
    "rms_norm_eps": (int, float),
    "attention_bias": (bool,),
    "mlp_bias": (bool,),
    "tie_word_embeddings": (bool,),
    "initializer_range": (int, float),
    "bos_token_id": (int, NoneType),
    "eos_token_id": (int, list, NoneType),
    "pad_token_id": (int, NoneType),
}
_CONFIG_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_CONFIG_REFUSED = {
    "auto_map": "the model comes with code of its own, and no code from a model folder is run",
    "quantization_config": "quantised weights are not supported; use the unquantised model",
}


# Finding a folder


def resolve_folder(name: str | Path) -> Path:
    """The local folder that `name` stands for.

    An existing folder is taken as it is. A string that reads like a hub id ("org/name") is
    downloaded from the Hugging Face hub, without pickle weights and code. A Path is never
    looked up on the hub.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; a model is a folder with {CONFIG_FILE}")
    looked_for = f"no model {str(name)!r}: there is no such folder"
    hint = f"only sft trains from scratch, by the names {', '.join(SMALL_NAMES)}"
    if not isinstance(name, str) or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{looked_for}, and it is no hub id (org/name); {hint}")

    from huggingface_hub import snapshot_download

    try:
        # fnmatch's * crosses slashes: without ignore_patterns, copies for other runtimes in
        # subfolders would come along.
        path = snapshot_download(name, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{looked_for}, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {error}); {hint}"
        ) from error
    return Path(path)


# config.json


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder that folder/config.json describes; ValueError, naming the key, if it is not
    one of ours."""
    path = Path(folder) / CONFIG_FILE
    raw = _read_json(path)
    for key, reason in _CONFIG_REFUSED.items():
        if raw.get(key):
            raise ValueError(f"{path}: {key} is refused: {reason}")
    for key, types in _CONFIG_TYPES.items():
        if key in raw and type(raw[key]) not in types:
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in types)
            raise ValueError(f"{path}: {key} must be {names}, not {raw[key]!r}")
    for key in _CONFIG_SIZES:
        if (size := raw.get(key)) is not None and size < 1:
            raise ValueError(f"{path}: {key} must be positive, not {size}")
    try:
        return DecoderConfig.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def is_reward_model(folder: str | Path) -> bool:
    """Whether the folder's weights hold a scalar head."""
    return "score.weight" in _read_weight_headers(Path(folder))


def check_vocabulary(config: DecoderConfig, tokenizer_vocab_size: int, folder: str | Path) -> None:
    """Refuse a tokenizer with ids beyond the embedding. A smaller one is fine: vocabularies are
    padded to round sizes."""
    if tokenizer_vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer_vocab_size} tokens, but vocab_size in "
            f"{CONFIG_FILE} (the rows of model.embed_tokens.weight) is {config.vocab_size}"
        )


# Weights in


def load_language_model(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> LanguageModel:
    """device: None is the CPU. dtype: None keeps the one the weights are stored in.

    A reward model's folder works where the embeddings are tied, as they are the head, and where
    it kept the head of the model it started from.
    """
    folder = Path(folder)
    config = load_config(folder)
    stored = _read_headers(folder)
    with torch.device("meta"):
        model = LanguageModel(config)
    _check_weights(model, stored, folder)
    _fill(model, stored, device, dtype)
    return model


def load_scalar_model(
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = torch.float32,
    head_seed: int = 0,
) -> tuple[ScalarModel, bool]:
    """The model, and whether its head is new: True where the folder has no score head, and
    the head was drawn with head_seed. device, dtype: as in load_language_model."""
    folder = Path(folder)
    config = load_config(folder)
    stored = _read_headers(folder)
    head_is_new = "score.weight" not in stored
    if head_is_new and "score.bias" in stored:
        raise ValueError(
            f"{stored['score.bias'].file} has score.bias, but the weights of {folder} have no "
            f"score.weight: two models are mixed in this folder"
        )
    with torch.device("meta"):
        model = ScalarModel(config)
    optional = {"score.weight", "score.bias"} if head_is_new else {"score.bias"}
    _check_weights(model, stored, folder, optional)
    _fill(model, stored, device, dtype)
    if head_is_new:
        model.initialize_head(head_seed)
    elif "score.bias" not in stored:
        torch.nn.init.zeros_(model.score.bias)
    if not config.tie_embeddings and (head := stored.get("lm_head.weight")):
        with safe_open(head.file, framework="pt") as file:
            model.kept_lm_head = file.get_tensor("lm_head.weight").to(dtype, copy=True)
    return model, head_is_new


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    """What a safetensors header says of one tensor. dtype: safetensors' name for it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def _read_headers(folder: Path) -> dict[str, _StoredTensor]:
    """As _read_weight_headers, and of our own file what the weights do not have."""
    stored = _read_weight_headers(folder)
    own = folder / HEAD_FILE
    return _read_header(own) | stored if own.exists() else stored


def _read_weight_headers(folder: Path) -> dict[str, _StoredTensor]:
    """Every tensor of a folder, by name: of its one file, else of the shards in its index."""
    if (folder / WEIGHTS_FILE).exists():
        return _read_header(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.exists():
        raise _no_weights(folder)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map must give a file name for each tensor")
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).exists()]:
        first = next(key for key, name in weight_map.items() if name == missing[0])
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files named in {INDEX_FILE}: "
            f"{', '.join(missing)} (with {first}); download or copy the folder again"
        )
    stored: dict[str, _StoredTensor] = {}
    for name in names:
        for key, tensor in _read_header(folder / name).items():
            if key in stored:
                raise ValueError(f"{key} is both in {stored[key].file} and in {tensor.file}")
            stored[key] = tensor
    for key, name in weight_map.items():
        if key not in stored or stored[key].file != folder / name:
            raise ValueError(f"{folder / name}: {key} is missing, though {index} places it there")
    return stored


def _no_weights(folder: Path) -> Exception:
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        return ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is loaded, and is "
            f"refused; convert the weights to {WEIGHTS_FILE}, for example by from_pretrained and "
            f"save_pretrained of transformers on a machine that may run that code"
        )
    return FileNotFoundError(
        f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE} "
        f"(pickle weights are neither downloaded nor loaded)"
    )


def _read_header(path: Path) -> dict[str, _StoredTensor]:
    """Names, shapes and dtypes; the file's length is checked against them."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {
                key: _StoredTensor(path, tuple(view.get_shape()), view.get_dtype())
                for key, view in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}); download or copy it again"
        ) from error


def _check_weights(
    model: Decoder,
    stored: Mapping[str, _StoredTensor],
    folder: Path,
    optional: Collection[str] = (),
) -> None:
    """Compare a model on the meta device with what is stored. One error lists every problem,
    up to a handful."""
    source = folder / (WEIGHTS_FILE if (folder / WEIGHTS_FILE).exists() else INDEX_FILE)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = []
    for key, shape in expected.items():
        tensor = stored.get(key)
        if tensor is None:
            if key not in optional:
                problems.append(f"{source}: {key} {shape} is missing{_missing_hint(key)}")
        elif tensor.shape != shape:
            problems.append(
                f"{tensor.file}: {key} has shape {tensor.shape}, but {CONFIG_FILE} "
                f"makes it {shape}{_shape_hint(key, model.config)}"
            )
        elif tensor.dtype not in _FLOAT_DTYPES:
            problems.append(
                f"{tensor.file}: {key} has dtype {tensor.dtype} "
                f"(supported: {', '.join(_FLOAT_DTYPES)})"
            )
    for key, tensor in stored.items():
        is_known = key in expected or key in _HEADS or key.endswith("rotary_emb.inv_freq")
        if not is_known:
            problems.append(f"{tensor.file}: {key} {tensor.shape} is not a tensor of this model")
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        tail = [f"and {more} more"] if more > 0 else []
        raise ValueError(
            "\n".join([f"{folder} does not fit its config:", *problems[:_MAX_PROBLEMS], *tail])
        )


def _missing_hint(key: str) -> str:
    if key != "lm_head.weight":
        return ""
    return " (tie_word_embeddings is false, and no starting model left its language-model head)"


def _shape_hint(key: str, config: DecoderConfig) -> str:
    if key not in ("model.embed_tokens.weight", "lm_head.weight"):
        return ""
    return f" (vocab_size {config.vocab_size})"


@torch.no_grad()
def _fill(
    model: Decoder,
    stored: Mapping[str, _StoredTensor],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Allocate a model that was built on the meta device and copy its weights in. The copy
    leaves no parameter backed by the file, which may be replaced while the model lives."""
    if dtype is None:
        dtype = _FLOAT_DTYPES[stored["model.embed_tokens.weight"].dtype]
    model.to(dtype).to_empty(device=device or "cpu")
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in stored}
    for path in sorted({stored[name].file for name in weights}):
        with safe_open(path, framework="pt") as file:
            for name, tensor in weights.items():
                if stored[name].file == path:
                    tensor.copy_(file.get_tensor(name))


# Weights out


def save_model(
    model: LanguageModel | ScalarModel, folder: str | Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write a folder that transformers opens. dtype: None keeps that of the parameters.

    Every file is replaced whole, config.json last: a folder killed while it is first written
    has none, and does not load. Tokenizer files are not the model's, and not written here.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, not {dtype}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    config = model.config.to_hf()
    config["dtype"] = str(state["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    # What another model may have left in the folder; the weights file goes before its index.
    stale = [folder / INDEX_FILE]
    if isinstance(model, ScalarModel):
        config["architectures"] = ["LlamaForSequenceClassification"]
        config["id2label"] = {"0": "LABEL_0"}  # one label is how transformers says num_labels 1
        config["label2id"] = {"LABEL_0": 0}
        own = {"score.bias": state.pop("score.bias")}
        if model.kept_lm_head is not None:
            own["lm_head.weight"] = model.kept_lm_head.to("cpu", dtype).contiguous()
        _write_tensors(folder / HEAD_FILE, own)
        stale.append(folder / GENERATION_FILE)
    else:
        config["architectures"] = ["LlamaForCausalLM"]
        token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        generation = {key: value for key, value in token_ids.items() if value is not None}
        _write_json(folder / GENERATION_FILE, generation)
        stale.append(folder / HEAD_FILE)
    _write_tensors(folder / WEIGHTS_FILE, state)
    _write_json(folder / CONFIG_FILE, config)
    for path in stale:
        path.unlink(missing_ok=True)


# Our notes


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderNotes:
    """What to know about a model that no Hugging Face file has a place for."""

    prompt_template: str = "{prompt}"
    """The text given to the model, with {prompt} once, where the prompt goes."""

    def __post_init__(self) -> None:
        template = self.prompt_template
        if not isinstance(template, str) or template.count("{prompt}") != 1:
            raise ValueError(
                f"prompt_template must be a text with {{prompt}} in it exactly once, "
                f"not {template!r}"
            )


def read_notes(folder: str | Path) -> FolderNotes:
    """The defaults where the folder has no notes."""
    path = Path(folder) / NOTES_FILE
    if not path.exists():
        return FolderNotes()
    raw = _read_json(path)
    known = [field.name for field in dataclasses.fields(FolderNotes)]
    if unknown := sorted(raw.keys() - set(known)):
        raise ValueError(f"{path}: unknown key {unknown[0]!r} (known: {', '.join(known)})")
    try:
        return FolderNotes(**raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_notes(notes: FolderNotes, folder: str | Path) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / NOTES_FILE, dataclasses.asdict(notes))


# Files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(content).__name__}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # format: some versions of transformers refuse a file that does not name its framework.
    _replace(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write elsewhere, flush, rename: a kill leaves the old file or the new one.

    Elsewhere is a scratch folder of a fixed name: safetensors goes through temporary files of
    its own, and whatever a kill leaves is swept by the next save.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        temporary = scratch / path.name
        write(temporary)
        # safetensors makes its files private; the umask, as the scratch folder got it, decides.
        temporary.chmod(scratch.stat().st_mode & 0o666)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

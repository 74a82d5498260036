"""Folders of models that our decoder lacks: read and written by transformers, checked by us.

No code from a folder is run and no pickle read. What a folder has wrong is found in its headers,
before weights are allocated, where its tensors have the names of the module's parameters; where
transformers converts them (experts stored one by one), its own report is checked after loading.
"""

import copy
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fuserl.model.config import DecoderConfig
from fuserl.model.config_json import CONFIG_FILE, GENERATION_FILE, generation_to_hf
from fuserl.model.decoder import Decoder
from fuserl.model.fallback import TransformersTrunk
from fuserl.model.fallback_config import logit_scale, switch_length
from fuserl.model.fallback_proof import check_parameters, choose_cache, probe, prove
from fuserl.model.files import read_json, write_json
from fuserl.model.heads import HeadKind, LanguageModel, ScalarModel
from fuserl.model.stored import (
    FLOAT_DTYPES,
    HEAD_FILE,
    StoredTensor,
    read_headers,
    write_tensors,
    write_weights,
)

_HEADS = ("lm_head.", "score.", "score_hidden.")
_MAX_PROBLEMS = 6


# Weights in


def load_language_model(
    folder: Path,
    config: DecoderConfig,
    stored: Mapping[str, StoredTensor],
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> LanguageModel:
    """stored: the headers of the folder. The rest as folder.load_language_model."""
    from transformers import AutoModelForCausalLM

    whole = _load(AutoModelForCausalLM, folder, stored, device, dtype)
    head = whole.get_output_embeddings()
    if head is None or whole.base_model is whole:
        raise ValueError(f"{type(whole).__name__} does not tell its trunk from its head")
    trunk = _trunk(config, whole.base_model)
    check_parameters(whole, head, trunk)
    weight = head.weight
    trunk.config = dataclasses.replace(
        config,
        vocab_size=weight.shape[0],
        hidden_size=weight.shape[1],
        tie_embeddings=weight is trunk.embed_tokens.weight,
        head_bias=getattr(head, "bias", None) is not None,
    )
    with torch.device("meta"):
        model = LanguageModel(trunk.config, cast(Decoder, trunk))
    if not trunk.config.tie_embeddings:
        model.lm_head.weight = weight
    if trunk.config.head_bias:
        model.lm_head_bias = head.bias
    prove(model, whole)
    choose_cache(trunk)
    return model


def load_scalar_model(
    folder: Path,
    config: DecoderConfig,
    stored: Mapping[str, StoredTensor],
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    head: HeadKind,
    head_seed: int,
) -> tuple[ScalarModel, bool]:
    """As folder.load_scalar_model; stored: the headers, those of our own file included."""
    from transformers import AutoModel

    module = _load(AutoModel, folder, stored, device, dtype)
    trunk = _trunk(config, module)
    trunk.config = dataclasses.replace(config, hidden_size=probe(trunk).shape[-1])
    check_parameters(module, None, trunk)
    score = {
        name: _read(stored[name])
        for name in ("score.weight", "score.bias", "score_hidden.weight", "score_hidden.bias")
        if name in stored
    }
    head_is_new = "score.weight" not in score
    if head_is_new and score:
        name, *_ = score
        raise ValueError(
            f"{stored[name].file} has {name}, but {folder} has no score.weight: two models are "
            "mixed in this folder"
        )
    if not head_is_new:
        head = "mlp" if "score_hidden.weight" in score else "linear"
    model = ScalarModel(trunk.config, head, cast(Decoder, trunk))
    for part in (model.score, model.score_hidden):  # the trunk may hold wider parameters
        if part is not None:
            part.to(device=trunk.device, dtype=trunk.dtype)
    model.initialize_head(head_seed)
    for name, tensor in score.items():
        parameter = model.get_parameter(name)
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"{stored[name].file}: {name} has shape {tuple(tensor.shape)}, but a scalar head "
                f"on this model has {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(tensor)
    if not config.tie_embeddings:
        model.kept_lm_head = _read_language_head(module.config, stored, trunk.dtype)
    return model, head_is_new


def _read_language_head(
    source: Any, stored: Mapping[str, StoredTensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a folder holds of a head that is not the embeddings, by its names in LanguageModel."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(source)
    head = skeleton.get_output_embeddings()
    name = next(name for name, module in skeleton.named_modules() if module is head)
    found = {}
    for kind, ours in (("weight", "lm_head.weight"), ("bias", "lm_head_bias")):
        for key in (f"{name}.{kind}", f"lm_head.{kind}"):  # a language model's, a reward model's
            if key in stored:
                found[ours] = _read(stored[key]).to(dtype, copy=True)
                break
    return found


def _trunk(config: DecoderConfig, module: nn.Module) -> TransformersTrunk:
    source: Any = module.config
    return TransformersTrunk(
        config, module, scale=logit_scale(source), switch_length=switch_length(source)
    )


def _read(stored: StoredTensor) -> Tensor:
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name)


def _load(
    auto: Any,
    folder: Path,
    stored: Mapping[str, StoredTensor],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Any:
    """A module of transformers with the folder's weights."""
    from transformers import AutoConfig

    source = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        skeleton = auto.from_config(source)
    kept = _kept_head(skeleton, stored)
    _check_headers(skeleton, stored, folder, kept)
    with _quiet():  # its report is checked here
        module, report = auto.from_pretrained(
            folder,
            dtype=_stored_dtype(stored) if dtype is None else dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    problems = [f"{key} is missing" for key in missing if key not in kept]
    for key, found, wanted in sorted(report["mismatched_keys"]):
        problems.append(f"{key} has shape {tuple(found)}, but config.json makes it {tuple(wanted)}")
    _refuse(folder, problems)
    for name in missing:  # a reward model's folder, which keeps it apart
        with torch.no_grad():
            module.get_parameter(name).copy_(_read(kept[name]))
    return module.to(device or "cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as chatter

    before = chatter.get_verbosity()
    chatter.set_verbosity_error()
    try:
        yield
    finally:
        chatter.set_verbosity(before)


def _stored_dtype(stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """That of the largest tensor: norms may be wider."""
    floats = [tensor for tensor in stored.values() if tensor.dtype in FLOAT_DTYPES]
    if not floats:
        return None
    return FLOAT_DTYPES[max(floats, key=lambda tensor: math.prod(tensor.shape)).dtype]


def _kept_head(skeleton: Any, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What our own file keeps of a language-model head, by the module's names for it: there every
    head is lm_head."""
    head = skeleton.get_output_embeddings()
    name = next((name for name, module in skeleton.named_modules() if module is head), "lm_head")
    return {
        f"{name}.{kind}": stored[f"lm_head.{kind}"]
        for kind in ("weight", "bias")
        if f"lm_head.{kind}" in stored
    }


def _check_headers(
    skeleton: nn.Module,
    stored: Mapping[str, StoredTensor],
    folder: Path,
    kept: Mapping[str, StoredTensor],
) -> None:
    """Compare a module on the meta device with what is stored, as far as names agree: where some
    stored tensors are not the module's, transformers may make the missing ones out of those."""
    problems = []
    names_of: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
        tensor = stored.get(name)
        if tensor is not None and tensor.shape != tuple(parameter.shape):
            problems.append(
                f"{tensor.file}: {name} has shape {tensor.shape}, but config.json makes it "
                f"{tuple(parameter.shape)}"
            )
    known = {name for names in names_of.values() for name in names}
    if all(name in known or name.startswith(_HEADS) for name in stored):
        problems += [
            f"{names[0]} is missing"
            for names in names_of.values()
            if not (stored.keys() | kept.keys()) & set(names)
        ]
    _refuse(folder, problems)


def _refuse(folder: Path, problems: list[str]) -> None:
    if not problems:
        return
    more = len(problems) - _MAX_PROBLEMS
    tail = [f"and {more} more"] if more > 0 else []
    raise ValueError(
        "\n".join([f"{folder} does not fit its config:", *problems[:_MAX_PROBLEMS], *tail])
    )


# Weights out


def save_model(
    model: LanguageModel | ScalarModel,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    """As folder.save_model. A scalar model is written as transformers' ForSequenceClassification
    where there is such a class with a linear head; else as the base model, its head in our own
    file alone."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / ".transformers.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        if isinstance(model, ScalarModel):
            whole, own = _under_scalar_head(model)
        else:
            whole, own = _under_language_head(model), {}
        whole.save_pretrained(scratch, state_dict=_state(whole, dtype))
        stored = read_headers(scratch)
        sizes = {name: _read(tensor).nbytes for name, tensor in stored.items()}
        write_weights(folder, sizes, lambda name: _read(stored[name]), max_shard_bytes)
        if isinstance(model, ScalarModel):
            tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in own.items()}
            write_tensors(folder / HEAD_FILE, tensors)
        else:
            (folder / HEAD_FILE).unlink(missing_ok=True)
        generation = generation_to_hf(model.config)
        if generation and isinstance(model, LanguageModel):
            write_json(folder / GENERATION_FILE, generation)
        else:
            (folder / GENERATION_FILE).unlink(missing_ok=True)
        content = read_json(scratch / CONFIG_FILE)
        if dtype is not None:
            content["dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / CONFIG_FILE, content)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _state(whole: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """In another dtype too, one tensor under two names stays one: transformers finds tied ones by
    that, and leaves the second out."""
    made: dict[int, Tensor] = {}
    state = {}
    for name, tensor in whole.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            made[id(tensor)] = tensor.detach().to(
                "cpu", dtype if tensor.is_floating_point() else None
            )
        state[name] = made[id(tensor)]
    return state


def _under_language_head(model: LanguageModel) -> Any:
    """transformers' model around the same parameters."""
    from transformers import AutoModelForCausalLM

    trunk: Any = model.trunk
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(copy.deepcopy(trunk.module.config))
    setattr(whole, whole.base_model_prefix, trunk.module)
    head = whole.get_output_embeddings()
    head.weight = model.output_weight
    if model.output_bias is not None:
        head.bias = model.output_bias
    return whole


def _under_scalar_head(model: ScalarModel) -> tuple[Any, dict[str, Tensor]]:
    """transformers' model around the same parameters, and what it has no place for."""
    import transformers

    trunk: Any = model.trunk
    config = copy.deepcopy(trunk.module.config)
    head = {name: t for name, t in model.state_dict().items() if not name.startswith("trunk.")}
    names = {"lm_head.weight": "lm_head.weight", "lm_head_bias": "lm_head.bias"}
    own = head | {names[name]: tensor for name, tensor in model.kept_lm_head.items()}
    classes: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    # A scaled trunk would give transformers' class another score.
    if type(config) not in classes or trunk.scale != 1.0 or model.score_hidden is not None:
        return trunk.module, own
    config.num_labels = 1
    with torch.device("meta"):
        whole = classes[type(config)](config)
    others = [name for name, _ in whole.named_parameters()]
    prefix = whole.base_model_prefix
    if [name for name in others if not name.startswith(f"{prefix}.")] != ["score.weight"]:
        return trunk.module, own
    setattr(whole, prefix, trunk.module)
    whole.score.weight = model.score.weight
    del own["score.weight"]
    return whole, own

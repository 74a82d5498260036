"""Adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors.

Tensors are named base_model.model.MODULE.lora_A.weight [rank, in] and .lora_B.weight [out, rank],
by Hugging Face's modules, whatever way their weight is stored; ours differ in one thing: where a
family stores query, key and value head by head (GPT-NeoX), the rows of B are put in that order.

A scalar model's head is stored as PEFT stores a module it trained whole ("modules_to_save"); its
bias has no place there, and is in the model's own folder.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fuserl.model.families import FAMILIES, Transposed
from fuserl.model.files import read_json, replace_file, write_json
from fuserl.model.heads import ScalarModel
from fuserl.model.lora import Model, Target, find_adapters, find_targets, named, put_adapters
from fuserl.model.lora_linear import Segment

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_HEAD = "score"
_HEAD_TENSOR = f"{_PREFIX}{_HEAD}.weight"
_NAME = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

_USED_KEYS = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
_HARMLESS_KEYS = {
    *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    # Where adapters are, the tensors say; how B A lies in a stored weight matters to merging there.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "fan_in_fan_out",
    # Of training alone: no dropout is applied here.
    *("inference_mode", "lora_dropout", "runtime_config", "ensure_weight_tying"),
    # Of how adapters start, where the base stays what it was (see _SOUND_STARTS).
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "velora_config"),
}
_SOUND_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_NEUTRAL: tuple[Any, ...] = (None, False, {}, [], "none")


def save_adapter(model: Model, folder: str | Path, *, base: str | None = None) -> None:
    """Write the model's adapters, in their own dtype. base: folder or hub id of the model without
    them, which is named in the configuration. PEFT loads the result on that model.

    The weights are written before the configuration, each file replaced whole.
    """
    targets = find_targets(model)
    tensors: dict[str, Tensor] = {}
    segments: list[Segment] = []
    for layer in find_adapters(model).values():
        for segment, a, b in layer.adapters():
            key = f"{_PREFIX}{segment.module}"
            tensors[f"{key}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = b.detach().cpu()[targets[segment.module].order]
            segments.append(segment)
    if not segments:
        raise ValueError("the model has no adapters to save")
    is_scalar = isinstance(model, ScalarModel)
    if isinstance(model, ScalarModel):
        if model.score_hidden is not None:
            raise ValueError("PEFT's files have no place for a head of two layers: save the model")
        tensors[_HEAD_TENSOR] = model.score.weight.detach().cpu().contiguous()
    ranks = Counter(segment.rank for segment in segments)
    alphas = Counter(segment.alpha for segment in segments)
    layout = FAMILIES[model.config.family].weights.modules
    rank, alpha = (counts.most_common(1)[0][0] for counts in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_scalar else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": _shortest_ends([s.module for s in segments], targets),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {s.module: s.rank for s in segments if s.rank != rank},
        "alpha_pattern": {s.module: s.alpha for s in segments if s.alpha != alpha},
        "use_rslora": segments[0].rslora,
        "fan_in_fan_out": any(isinstance(stored, Transposed) for stored in layout.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": [_HEAD] if is_scalar else None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(
        folder / ADAPTER_WEIGHTS_FILE,
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    write_json(folder / ADAPTER_CONFIG_FILE, config)


def load_adapter(model: Model, folder: str | Path) -> None:
    """Give the model the adapters of a folder that `save_adapter` or PEFT wrote, in place; the
    rest of it is frozen. ValueError naming file and key, and no change to the model, where the
    folder is broken, does not fit the model, or holds what is no plain low-rank adapter.
    """
    folder = Path(folder)
    config_path, path = folder / ADAPTER_CONFIG_FILE, folder / ADAPTER_WEIGHTS_FILE
    config = _read_config(config_path, model)
    tensors = _read_tensors(path)
    head = _pop_head(path, tensors, model) if config["keeps_head"] else None
    pairs = _pairs(path, tensors, find_targets(model))
    segments = [(target, _segment(config_path, config, target)) for target, _, _ in pairs.values()]
    for target, segment in segments:
        _check_shapes(path, model, segment, *pairs[target.module])
    with torch.no_grad():
        for layer in put_adapters(model, segments):
            for segment, a, b in layer.adapters():
                target, stored_a, stored_b = pairs[segment.module]
                a.copy_(stored_a)
                b[target.order.to(b.device)] = stored_b.to(b)
        if head is not None:
            assert isinstance(model, ScalarModel)
            model.score.weight.copy_(head)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        if pickles := sorted(p.name for p in path.parent.glob("adapter_model.*")):
            raise ValueError(
                f"{path.parent / pickles[0]} is a pickle, which can run code when it is loaded, "
                f"and is refused; save the adapter as {path.name} (PEFT does so by default)"
            )
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}); download or copy it again"
        ) from error


def _pop_head(path: Path, tensors: dict[str, Tensor], model: Model) -> Tensor:
    """The scalar head, out of the tensors."""
    assert isinstance(model, ScalarModel)
    head = tensors.pop(_HEAD_TENSOR, None)
    if head is None or head.shape != model.score.weight.shape:
        found = "is missing" if head is None else f"has shape {tuple(head.shape)}"
        raise ValueError(f"{path}: {_HEAD_TENSOR} {tuple(model.score.weight.shape)} {found}")
    return head


def _read_config(path: Path, model: Model) -> dict[str, Any]:
    """The keys in use, checked, rank and alpha with their patterns; all others must be
    harmless."""
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', not {raw.get('peft_type')!r}")
    start = raw.get("init_lora_weights")
    if not any(start is sound or (start == sound and start != 1) for sound in _SOUND_STARTS):
        raise ValueError(
            f"{path}: init_lora_weights {start!r} changes the base model's weights, and is not "
            "supported; convert the adapter (PEFT: path_initial_model_for_weight_conversion)"
        )
    keeps_head = raw.get("modules_to_save") == [_HEAD] and isinstance(model, ScalarModel)
    if keeps_head:
        del raw["modules_to_save"]
    for key, value in raw.items():
        if key not in _USED_KEYS | _HARMLESS_KEYS and value not in _NEUTRAL:
            raise ValueError(f"{path}: {key} {value!r} is not supported")
    rank = _typed(path, raw, "r", int, 8)
    alpha = _typed(path, raw, "lora_alpha", (int, float), 8)
    return {
        "keeps_head": keeps_head,
        "use_rslora": _typed(path, raw, "use_rslora", bool, False),
        "r": (rank, _patterns(path, raw, "rank_pattern", int)),
        "lora_alpha": (alpha, _patterns(path, raw, "alpha_pattern", (int, float))),
    }


def _typed(
    path: Path, raw: Mapping[str, Any], key: str, kinds: type | tuple[type, ...], default: Any
) -> Any:
    """The value of a key, which may be missing or null."""
    value = default if raw.get(key) is None else raw[key]
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{path}: {key} must be {names}, not {value!r}")
    return value


def _patterns(
    path: Path, raw: Mapping[str, Any], key: str, kinds: type | tuple[type, ...]
) -> dict[re.Pattern[str], Any]:
    """Values for modules by expressions that fit the end of their names."""
    found: dict[re.Pattern[str], Any] = {}
    for expression, value in _typed(path, raw, key, dict, {}).items():
        _typed(path, {f"{key} {expression!r}": value}, f"{key} {expression!r}", kinds, None)
        try:
            found[re.compile(rf"(.*\.)?({expression})$")] = value
        except re.error as error:
            raise ValueError(f"{path}: {key} {expression!r}: {error}") from None
    return found


def _pairs(
    path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Target]
) -> dict[str, tuple[Target, Tensor, Tensor]]:
    """A and B by module."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _NAME.fullmatch(key)
        if match is None:
            raise ValueError(f"{path}: {key} is no tensor of a plain low-rank adapter")
        if match["module"] not in targets:
            raise ValueError(
                f"{path}: {key} is for a module that is no product of this model's layers"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {key} has dtype {tensor.dtype}")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise ValueError(f"{path} holds no adapter")
    pairs = {}
    for module, both in sides.items():
        for side in "AB":
            if side not in both:
                raise ValueError(f"{path}: {_PREFIX}{module}.lora_{side}.weight is missing")
        pairs[module] = (targets[module], both["A"], both["B"])
    return pairs


def _segment(path: Path, config: Mapping[str, Any], target: Target) -> Segment:
    """Rank and alpha of a module: the pattern's that fits its name first, else the common ones."""
    values = []
    for key in ("r", "lora_alpha"):
        common, patterns = config[key]
        fits = (value for pattern, value in patterns.items() if pattern.match(target.module))
        values.append(next(fits, common))
    try:
        return Segment(
            target.module,
            target.start,
            target.stop,
            rank=values[0],
            alpha=float(values[1]),
            rslora=config["use_rslora"],
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _check_shapes(
    path: Path, model: Model, segment: Segment, target: Target, a: Tensor, b: Tensor
) -> None:
    linear = model.get_submodule(target.linear)
    expected = {
        "A": (a, (segment.rank, linear.in_features)),
        "B": (b, (target.stop - target.start, segment.rank)),
    }
    for side, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{path}: {_PREFIX}{target.module}.lora_{side}.weight has shape "
                f"{tuple(tensor.shape)}, but rank {segment.rank} ({ADAPTER_CONFIG_FILE}) and the "
                f"model make it {shape}"
            )


def _shortest_ends(modules: list[str], targets: Mapping[str, Target]) -> list[str]:
    """Ends of names that name these modules and no other, as short as they can be."""
    wanted = set(modules)
    ends = set()
    for module in modules:
        parts = module.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        ends.add(next(t for t in tails if {m for m in targets if named(m, t)} <= wanted))
    return sorted(ends)

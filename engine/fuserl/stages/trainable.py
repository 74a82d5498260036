"""What of a model trains, in which precision, and what its backward pass computes again."""

from pathlib import Path
from typing import TypeVar

import torch

from fuserl.config import TrainConfig
from fuserl.device import default_device
from fuserl.model.adapter_folder import save_adapter
from fuserl.model.freezing import freeze_lowest
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.lora import ALL_LINEAR, add_lora, find_adapters, freeze_base, merged
from fuserl.model.notes import FolderNotes
from fuserl.policy import save_folder
from fuserl.run import ADAPTER_FOLDER
from fuserl.tokenizer import Tokenizer

AnyModel = TypeVar("AnyModel", bound=LanguageModel | ScalarModel)


def training_dtype(config: TrainConfig) -> torch.dtype | None:
    """What weights are loaded in; None: as they are stored."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if default_device(config.device).type == "cpu" else None


def make_trainable(model: LanguageModel | ScalarModel, config: TrainConfig) -> None:
    """Set up a loaded model as the configuration says, before its optimizer is made; `adapt`
    comes second.

    Raises ValueError for a model handed over in another dtype than the one asked for.
    """
    dtype = model.trunk.dtype
    if config.dtype != "auto" and dtype != getattr(torch, config.dtype):
        raise ValueError(
            f"dtype {config.dtype} was asked for, but the policy is {dtype}: load it with "
            f"load_policy(folder, dtype=torch.{config.dtype})"
        )
    if dtype == torch.float16:
        model.float()  # gradients underflow in float16; float32 holds the same weights
    if find_adapters(model):
        raise ValueError(
            "the model has adapters, of a run that did not end or of load_adapter: load it anew, "
            "or merge them first (fuserl.model.lora.merged)"
        )
    model.trunk.checkpointing = config.activation_checkpointing
    model.trunk.shared_layers = 0  # what an earlier run shared may train in this one
    freeze_lowest(model, config.frozen_layers)
    if config.lora_rank:
        freeze_base(model)


def adapt(model: LanguageModel | ScalarModel, config: TrainConfig, *, seed: int) -> None:
    """Give the model the adapters that the configuration asks for, if any. After whatever copies
    it, before its optimizer is made."""
    if config.lora_rank == 0:
        return
    alpha = 2.0 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    targets = [name.strip() for name in config.lora_targets.split(",")]
    add_lora(
        model,
        config.lora_rank,
        alpha,
        ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        seed=seed,
    )


def save_trained(
    out: Path,
    model: AnyModel,
    tokenizer: Tokenizer | None,
    notes: FolderNotes,
    *,
    base: str,
) -> AnyModel:
    """Write the model with all that its next stage needs: adapters merged into it, and in
    `adapter` by themselves (under a scalar head of two layers not: PEFT has no place for it).
    base: what the run started from. Returns the model as it was written."""
    save_folder(out, model, tokenizer, notes)
    has_place = isinstance(model, LanguageModel) or model.score_hidden is None
    if find_adapters(model) and has_place:
        save_adapter(model, out / ADAPTER_FOLDER, base=base)
    return merged(model)

"""What of a model trains, in which precision, and what its backward pass computes again."""

import torch

from fuserl.config import TrainConfig
from fuserl.device import default_device
from fuserl.model.freezing import freeze_lowest
from fuserl.model.heads import LanguageModel, ScalarModel


def training_dtype(config: TrainConfig) -> torch.dtype | None:
    """What weights are loaded in; None: as they are stored."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.float32 if default_device(config.device).type == "cpu" else None


def make_trainable(model: LanguageModel | ScalarModel, config: TrainConfig) -> None:
    """Set up a loaded model as the configuration says, before its optimizer is made.

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
    model.trunk.checkpointing = config.activation_checkpointing
    freeze_lowest(model, config.frozen_layers)

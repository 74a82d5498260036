"""Where a run computes."""

import os

import torch


def default_device(name: str | None = None) -> torch.device:
    """The device asked for, else cuda:LOCAL_RANK if there is CUDA, else the CPU."""
    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {name!r} was asked for, but torch sees no CUDA device")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")

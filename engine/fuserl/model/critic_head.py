"""The head of a critic on the policy's own decoder, in a file beside the policy's Hugging Face
ones: transformers opens the folder as a language model and does not see it."""

from pathlib import Path

import torch
from torch import Tensor

from fuserl.model.heads import HeadKind, LanguageModel, SharedCritic
from fuserl.model.stored import CRITIC_FILE, read_header, read_tensors, write_tensors


def save_critic_head(critic: SharedCritic, folder: Path) -> None:
    tensors = {k: t.detach().cpu().contiguous() for k, t in critic.state_dict().items()}
    write_tensors(folder / CRITIC_FILE, tensors)


@torch.no_grad()
def shared_critic(
    policy: LanguageModel, folder: Path, kind: HeadKind | None, seed: int
) -> SharedCritic:
    """A critic on the policy's decoder. Its head is the one in `folder`, where that has one of
    the kind asked for (None: any), else it is drawn from the seed. ValueError for a head that
    does not fit the policy."""
    path = folder / CRITIC_FILE
    stored = read_header(path) if path.exists() else {}
    has: HeadKind = "mlp" if "score_hidden.weight" in stored else "linear"
    critic = SharedCritic(policy, kind or has)
    if not stored or critic.head_kind != has:
        critic.initialize_head(seed)
        return critic
    own = critic.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    for name in sorted(shapes.keys() | stored.keys()):
        found = stored[name].shape if name in stored else None
        if found != shapes.get(name):
            raise ValueError(
                f"{path}: {name} has shape {found}, where a critic on this policy has "
                f"{shapes.get(name)}"
            )

    def keep(name: str, tensor: Tensor) -> None:
        own[name].copy_(tensor)

    read_tensors(stored, keep)
    return critic

"""What a module of transformers must show on a few tokens before it is used.

Its logits must be a product of its hidden states and its head, and its hidden states must not
depend on later tokens. Whether its cache can be used is tried in the same way.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fuserl.model.fallback import TransformersTrunk
from fuserl.model.fallback_cache import CachedRows
from fuserl.model.heads import LanguageModel
from fuserl.model.packing import Packing

logger = logging.getLogger(__name__)


def check_parameters(whole: nn.Module, head: nn.Module | None, trunk: TransformersTrunk) -> None:
    """Refuse parameters that a checkpoint or a head would not hold."""
    name = type(whole).__name__
    of_trunk = [parameter for _, parameter in trunk.named_parameters(remove_duplicate=False)]
    if len({id(parameter) for parameter in of_trunk}) != len(of_trunk):
        raise ValueError(f"{name} shares weights between its layers, which is not supported")
    known = {id(parameter) for parameter in of_trunk}
    known |= {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    if other := [key for key, parameter in whole.named_parameters() if id(parameter) not in known]:
        raise ValueError(f"{name} has {other[0]}, which is neither in its trunk nor in its head")


def _tokens(trunk: TransformersTrunk) -> Tensor:
    """A few token ids, [2, S]."""
    length = min(8, trunk.max_positions)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(trunk.config.vocab_size, (2, length), generator=generator)
    return ids.to(trunk.device)


@torch.no_grad()
def probe(trunk: TransformersTrunk) -> Tensor:
    """Hidden states of _tokens, [2, S, D]; ValueError where they depend on later tokens."""
    ids = _tokens(trunk)
    packing = Packing.of([ids.shape[1]] * 2, ids.device)
    hidden = trunk(ids.flatten(), packing).view(*ids.shape, -1)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % trunk.config.vocab_size
    again = trunk(other.flatten(), packing).view(*ids.shape, -1)
    if not _equal(again[:, :-1], hidden[:, :-1]):
        raise ValueError(
            f"{type(trunk.module).__name__} is no causal decoder: what it makes of a token depends "
            "on the tokens behind it"
        )
    return hidden


@torch.no_grad()
def prove(model: LanguageModel, whole: Any) -> None:
    """ValueError where our head on the trunk does not give the logits of the whole module."""
    trunk: Any = model.trunk
    logits = whole(input_ids=_tokens(trunk), use_cache=False).logits
    ours = model.logits(probe(trunk))
    if ours.shape != logits.shape or not _equal(ours, logits):
        raise ValueError(
            f"the logits of {type(whole).__name__} are no product of its hidden states and its "
            "output embeddings (with bias, scale or soft cap), so its head cannot be used"
        )


@torch.no_grad()
def choose_cache(trunk: TransformersTrunk) -> None:
    """Whether cached decoding gives what one pass gives, tried on ragged rows."""
    ids = _tokens(trunk)
    length = ids.shape[1]
    lengths = [length, length - 2]
    packing = Packing.of(lengths, ids.device)
    expected = trunk(ids[packing.rows, packing.positions], packing)[packing.last]
    prompts = Packing.of([n - 1 for n in lengths], ids.device)
    cache = CachedRows(prompts, torch.arange(2, device=ids.device), 1)
    last = torch.tensor(lengths, device=ids.device) - 1
    reason = "its state is no plain cache of keys and values"
    try:
        cache.prefill(trunk, ids[prompts.rows, prompts.positions])
        given = cache.decode(trunk, ids[torch.arange(2, device=ids.device), last])
        trunk.has_cache = cache.is_plain and _equal(given, expected)
    except Exception as error:  # whatever a module says that takes no such cache
        trunk.has_cache = False
        reason = f"{type(error).__name__}: {error}"
    if not trunk.has_cache:
        logger.warning(
            "%s decodes without a cache, every token in the time of its whole row: %s",
            type(trunk.module).__name__,
            reason,
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    """By mean error: in half precision an expert chosen otherwise may move one token far."""
    tolerance = 1e-3 if b.dtype.itemsize >= 4 else 3e-2
    a, b = a.double(), b.double()
    return bool((a - b).abs().mean() <= tolerance * b.abs().mean())

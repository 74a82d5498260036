"""Hydra (trlX's word): policy, reference and critic are heads on one frozen trunk.

With the embeddings and the lowest layers frozen, the three agree up to there: they hold those
parameters in common, and own the layers above, the final norm and a head each. The rollout keeps
the residual stream before the first layer of their own, of every token. The
tops start from it, and no pass of scoring or of the update goes below it again.

What the tops give is what three whole models give, up to the rounding of the kept stream: it is
that of cached decoding, not of a packed pass (fp32: within 1e-5 of a log-probability).
"""

import copy
from typing import TypeVar

from torch import Tensor, nn

from fuserl.model.decoder import Decoder
from fuserl.model.heads import HeadKind, LanguageModel, ScalarModel
from fuserl.model.packing import Packing
from fuserl.model.steps import PackedStep

Model = TypeVar("Model", bound=nn.Module)


def copy_trained(model: Model) -> Model:
    """A copy of what trains; frozen parameters are the model's own, in the same storage."""
    memo = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo)


def frozen_copy(model: Model) -> Model:
    """A model that stays as this one is now, at the price of what trains."""
    return copy_trained(model).requires_grad_(False)


def critic_on(policy: LanguageModel, seed: int, head: HeadKind = "linear") -> ScalarModel:
    """A critic on the policy's frozen layers: it owns a copy of the others, which train as they
    do in the policy, and a head drawn from the seed."""
    return ScalarModel.on_trunk(policy, seed, head, trunk=copy_trained(policy.trunk))


def share_trunk(depth: int, *trunks: Decoder) -> None:
    """Let these decoders start from kept states: all hold their `depth` lowest layers in common
    with the policy. ValueError where one does not, or where there is nothing to share."""
    if depth < 1:
        raise ValueError("a hydra needs a frozen layer: with frozen_layers 0 nothing is shared")
    common = _lowest(trunks[0], depth)
    for trunk in trunks:
        if any(a is not b for a, b in zip(_lowest(trunk, depth), common, strict=True)):
            raise ValueError(f"the lowest {depth} layers of a hydra's models must be the same")
        if any(parameter.requires_grad for parameter in common):
            raise ValueError(f"the lowest {depth} layers of a hydra's models must be frozen")
        trunk.shared_layers = depth


def hidden_states(
    trunk: Decoder, token_ids: Tensor, packing: Packing, trunk_states: Tensor | None
) -> Tensor:
    """The decoder's hidden states, [N] token ids to [N, D]: from trunk_states ([N, D], what the
    shared layers gave) where there are any and this decoder shares them."""
    if trunk_states is None or not trunk.shared_layers:
        return trunk(token_ids, packing)
    return trunk.upper(trunk_states, PackedStep(packing, trunk.exact), trunk.shared_layers)


def _lowest(trunk: Decoder, depth: int) -> list[nn.Parameter]:
    parts: list[nn.Module] = [trunk.embed_tokens, *trunk.layers[:depth]]
    if trunk.config.rope is None:
        parts.append(trunk.embed_positions)
    return [parameter for part in parts for parameter in part.parameters()]

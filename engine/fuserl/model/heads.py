"""A decoder under a head: next-token scores over the vocabulary, or one number a token."""

import copy
from typing import Literal, Self

import torch
from torch import Tensor, nn

from fuserl.model.config import DecoderConfig
from fuserl.model.decoder import Decoder
from fuserl.model.packing import Packing

HeadKind = Literal["linear", "mlp"]


class LanguageModel(nn.Module):
    """A decoder with a vocabulary head, which has no weight of its own when tied."""

    def __init__(self, config: DecoderConfig, trunk: Decoder | None = None) -> None:
        super().__init__()
        self.trunk = Decoder(config) if trunk is None else trunk
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        self.lm_head_bias = bias

    @property
    def config(self) -> DecoderConfig:
        return self.trunk.config

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def output_weight(self) -> Tensor:
        """[V, D]"""
        if self.config.tie_embeddings:
            return self.trunk.embed_tokens.weight
        return self.lm_head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """[V]"""
        return self.lm_head_bias

    def forward(self, token_ids: Tensor, packing: Packing) -> Tensor:
        """token_ids: [N] int64, packed. Returns the hidden states after the final norm, [N, D]."""
        return self.trunk(token_ids, packing)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]. Losses use fk.linear_* instead, which never hold them all."""
        logits = nn.functional.linear(hidden, self.output_weight, self.output_bias)
        softcap = self.config.final_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Matrices from N(0, init_std^2) by a generator of their own; norms one, biases zero."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        self.trunk.initialize(generator)
        if not self.config.tie_embeddings:
            self.lm_head.weight.normal_(std=self.config.init_std, generator=generator)
        if self.lm_head_bias is not None:
            self.lm_head_bias.zero_()


class ScalarHead(nn.Module):
    """One number from a hidden state: of a reward model, of a critic, or of a critic on another
    model's decoder.

    kind: one product, or an MLP of one hidden layer twice as wide with ReLU (as trlX's value
    head). The bias lets a reward model be centred (references score 0 on average) and lets a
    critic that starts from it inherit the same scale.
    """

    def __init__(self, size: int, kind: HeadKind = "linear") -> None:
        super().__init__()
        if kind == "mlp":
            self.score_hidden: nn.Linear | None = nn.Linear(size, 2 * size)
            self.score = nn.Linear(2 * size, 1)
        else:
            self.score_hidden = None
            self.score = nn.Linear(size, 1)

    @property
    def head_kind(self) -> HeadKind:
        return "linear" if self.score_hidden is None else "mlp"

    @torch.no_grad()
    def initialize_head(self, seed: int) -> None:
        """N(0, 1 / (D + 1)), bias zero, as in Huang et al., 2024 (the N+ implementation
        details of RLHF with PPO)."""
        generator = torch.Generator(device=self.score.weight.device).manual_seed(seed)
        for linear in (self.score_hidden, self.score):
            if linear is not None:
                std = (linear.in_features + 1) ** -0.5
                linear.weight.normal_(std=std, generator=generator)
                linear.bias.zero_()

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] to [...] fp32, computed in fp32 under a narrower decoder too: rounded to bf16,
        values around 1 would differ by 0.004 or not at all."""
        if self.score_hidden is not None:
            hidden = torch.relu(_wide_linear(self.score_hidden, hidden))
        return _wide_linear(self.score, hidden).squeeze(-1).float()


class SharedCritic(ScalarHead):
    """A critic on the policy's own decoder, which is no part of this module: neither its
    parameters nor its state."""

    trunk: Decoder

    def __init__(self, policy: LanguageModel, kind: HeadKind = "linear") -> None:
        super().__init__(policy.config.hidden_size, kind)
        self.to(device=policy.device, dtype=policy.trunk.dtype)
        object.__setattr__(self, "trunk", policy.trunk)


class ScalarModel(ScalarHead):
    """A decoder with a scalar head: a reward model or a critic."""

    kept_lm_head: dict[str, Tensor]
    """What a language-model head that is not the embeddings held in the model this one started
    from, by its names in LanguageModel. No parameter; it waits on the CPU for a later stage that
    starts a language model from here."""

    def __init__(
        self, config: DecoderConfig, head: HeadKind = "linear", trunk: Decoder | None = None
    ) -> None:
        super().__init__(config.hidden_size, head)
        self.trunk = Decoder(config) if trunk is None else trunk
        self.kept_lm_head = {}

    @classmethod
    def on_trunk(
        cls,
        model: LanguageModel,
        seed: int,
        head: HeadKind = "linear",
        *,
        trunk: Decoder | None = None,
    ) -> Self:
        """The model's decoder under a head drawn from the seed. trunk: default a copy of it, all
        of which trains."""
        if trunk is None:
            trunk = copy.deepcopy(model.trunk).requires_grad_(True)
        scalar = cls(model.config, head, trunk)
        scalar.to(device=model.device, dtype=model.trunk.dtype)
        scalar.initialize_head(seed)
        scalar.kept_lm_head = {
            name: tensor.detach().cpu().clone()
            for name, tensor in model.state_dict().items()
            if not name.startswith("trunk.")
        }
        return scalar

    def with_head(self, kind: HeadKind | None, seed: int) -> "ScalarModel":
        """This model, its decoder under a new head drawn from the seed unless its own is of the
        kind asked for (None: any)."""
        if kind in (None, self.head_kind):
            return self
        model = ScalarModel(self.config, kind, self.trunk)
        model.to(device=self.device, dtype=self.trunk.dtype)
        model.initialize_head(seed)
        model.kept_lm_head = self.kept_lm_head
        return model

    @property
    def config(self) -> DecoderConfig:
        return self.trunk.config

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Decoder and head by generators of their own: see Decoder and `initialize_head`."""
        self.trunk.initialize(torch.Generator(device=self.device).manual_seed(seed))
        self.initialize_head(seed)

    def forward(self, token_ids: Tensor, packing: Packing) -> Tensor:
        """token_ids: [N] int64, packed. Returns the value after each token, [N] fp32."""
        return self.head(self.trunk(token_ids, packing))


Critic = ScalarModel | SharedCritic


def _wide_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """The product in fp32, or in a wider dtype of x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return nn.functional.linear(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype))

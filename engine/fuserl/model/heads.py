"""A decoder with a head: next-token scores over the vocabulary, or one number a position.

Parameter names are those of LlamaForCausalLM and LlamaForSequenceClassification.
"""

from typing import Self

import torch
from torch import Tensor, nn

from fuserl.model.config import DecoderConfig
from fuserl.model.decoder import Decoder


class LanguageModel(Decoder):
    """Decoder with a vocabulary head; no bias, and no parameter of its own when tied."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """[V, D]"""
        if self.config.tie_embeddings:
            return self.model.embed_tokens.weight
        return self.lm_head.weight


class ScalarModel(Decoder):
    """Decoder with a scalar head: a reward model or a critic.

    The bias lets a reward model be centred (references score 0 on average) and lets a critic
    that starts from it inherit the same scale.
    """

    kept_lm_head: Tensor | None = None
    """[V, D], untied embeddings only: the head of the language model this one started from. No
    parameter; it waits on the CPU for a later stage that starts a language model from here."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1)

    @classmethod
    def on_trunk(cls, model: LanguageModel, seed: int) -> Self:
        """A copy of the model's decoder under a head drawn from the seed."""
        scalar = cls(model.config).to(model.device)
        scalar.model.load_state_dict(model.model.state_dict())
        scalar.initialize_head(seed)
        if not model.config.tie_embeddings:
            scalar.kept_lm_head = model.output_weight.detach().cpu().clone()
        return scalar

    @torch.no_grad()
    def initialize_head(self, seed: int) -> None:
        """N(0, 1 / (D + 1)), bias zero, as in Huang et al., 2024 (the N+ implementation
        details of RLHF with PPO)."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        self.score.weight.normal_(std=(self.config.hidden_size + 1) ** -0.5, generator=generator)
        self.score.bias.zero_()

    def values(self, token_ids: Tensor) -> Tensor:
        """[B, S] token ids, right-padded, to [B, S] fp32: the value after each token."""
        return self.score(self(token_ids)).squeeze(-1).float()

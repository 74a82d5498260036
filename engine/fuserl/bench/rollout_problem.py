"""What the rollout benchmark asks for: models, prompts with their limits, and the fp64 truth."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fuserl.bench.case import DTYPES
from fuserl.bench.shapes import SHAPES
from fuserl.bench.training_problem import convert, make_source
from fuserl.bench.truth import MAX_DEVIATIONS, finite_norm
from fuserl.model.config import DecoderConfig
from fuserl.model.heads import LanguageModel
from fuserl.model.weights import load_hf_state

_SEED = 0
_SPREAD = 0.8  # of the log-normal distribution of limits
_CHECKED = 8  # requests of a case that are held against the truth
_GREEDY_TOKENS = 16


def _sizes(
    hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int, vocab_size: int
) -> DecoderConfig:
    return DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        vocab_size=vocab_size,
        max_positions=512,
        tie_embeddings=False,
    )


MODELS = {
    "tiny": _sizes(32, 2, 2, 64, 128),
    "small": _sizes(256, 6, 8, 704, 4096),
    "big": _sizes(512, 8, 8, 1408, 32_000),
    **SHAPES,
}
"""tiny is for tests; small and big have 6.9 and 58.4 million parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests that end at their limits alone: an EOS is a token as any other."""

    num_requests: int
    prompt_length: int = 64
    max_new_tokens: int
    median_new_tokens: int | None = None
    """Of limits drawn log-normally up to max_new_tokens. None: each request has all of them."""


WORKLOADS = {
    "uniform": Workload(num_requests=32, max_new_tokens=128),
    "ragged": Workload(num_requests=64, max_new_tokens=256, median_new_tokens=48),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutCase:
    """One model, workload and dtype."""

    model: str
    """A key of MODELS."""
    workload: str
    """uniform or ragged."""
    requests: Workload
    dtype: str
    """fp32 or bf16: of weights, cache and products."""
    device: str

    @property
    def title(self) -> str:
        return f"rollout, {self.model}, {self.workload} lengths, {self.dtype} {self.device}"


@dataclass(frozen=True, slots=True)
class Completions:
    """One entry a request, in their order."""

    token_ids: list[list[int]]
    logprobs: list[list[float]] | None  # of the tokens; None from a provider that gives none


class RolloutProblem:
    """Requests, transformers' model with random weights in the case's dtype, and what is right."""

    def __init__(self, case: RolloutCase) -> None:
        """Raises Unavailable without transformers."""
        self.case = case
        self.config = MODELS[case.model]
        self.prompts = make_prompts(case.requests, self.config.vocab_size)
        self.limits = make_limits(case.requests)
        self.source = convert(make_source(self.config, case.device).eval(), DTYPES[case.dtype])
        self.source.generation_config.eos_token_id = None

    def our_model(self) -> LanguageModel:
        with torch.device("meta"):
            model = LanguageModel(self.config).to(DTYPES[self.case.dtype])
        model.to_empty(device=self.case.device)
        load_hf_state(model, self.source.state_dict())
        return model

    def their_copy(self) -> Any:
        """For a provider that changes the module."""
        return copy.deepcopy(self.source)

    @property
    def greedy_prompts(self) -> list[list[int]]:
        """Ragged, from one token to all of a prompt."""
        chosen = self._checked
        longest = self.case.requests.prompt_length - 1
        return [
            self.prompts[row][: 1 + longest * number // max(1, len(chosen) - 1)]
            for number, row in enumerate(chosen)
        ]

    @property
    def greedy_limits(self) -> list[int]:
        return [min(_GREEDY_TOKENS, self.case.requests.max_new_tokens)] * len(self._checked)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_new_tokens(self) -> int:
        return sum(self.limits)

    @property
    def num_flops(self) -> int:
        """Of the products with weights alone: the layers for every token, the vocabulary's for
        every new one."""
        head = self.config.hidden_size * self.config.vocab_size
        tables = 1 if self.config.tie_embeddings else 2
        layers = sum(p.numel() for p in self.source.parameters() if p.ndim == 2) - tables * head
        tokens = self.num_prompt_tokens + self.num_new_tokens
        return 2 * (layers * tokens + head * self.num_new_tokens)

    def kv_bytes(self, num_tokens: int) -> int:
        """Of a cache with room for so many tokens, all layers together."""
        sizes = self.config
        per_layer = 2 * sizes.num_kv_heads * sizes.head_dim * DTYPES[self.case.dtype].itemsize
        return num_tokens * sizes.num_layers * per_layer

    def greedy_error(self, completions: Completions) -> float:
        """How far a greedy token's log-probability lies below the likeliest one's, at most.

        It is taken along the completion itself, so that after a tie two rightful completions may
        go on differently. Infinite for completions of wrong lengths.
        """
        if not _have_lengths(completions, self.greedy_limits):
            return math.inf
        errors = []
        for prompt, tokens in zip(self.greedy_prompts, completions.token_ids, strict=True):
            logprobs, chosen = self._truth_of(prompt, tokens)
            errors.append(float((logprobs.amax(-1) - chosen).max()))
        return max(errors)

    def sampling_error(self, completions: Completions) -> float:
        """The largest difference of a log-probability from the truth (0 without any).

        Infinite for completions of wrong lengths, and for tokens that together are far likelier
        or rarer than those of a fair draw.
        """
        if not _have_lengths(completions, self.limits):
            return math.inf
        error = surprise = variance = 0.0
        for row in self._checked:
            tokens = completions.token_ids[row]
            logprobs, chosen = self._truth_of(self.prompts[row], tokens)
            probabilities = logprobs.exp()
            mean = (probabilities * logprobs).sum(-1)
            surprise += float((chosen - mean).sum())
            variance += float(((probabilities * logprobs.square()).sum(-1) - mean.square()).sum())
            if completions.logprobs is not None:
                given = torch.tensor(completions.logprobs[row], device=chosen.device)
                error = max(error, finite_norm(given, given.double() - chosen))
        is_fair = abs(surprise) <= MAX_DEVIATIONS * math.sqrt(variance)
        return error if is_fair else math.inf

    @property
    def _checked(self) -> list[int]:
        """Which requests, evenly."""
        number = len(self.prompts)
        return list(range(0, number, -(-number // _CHECKED)))

    @cached_property
    def _truth(self) -> Any:
        """In float64 where that takes at most a quarter of a GPU's memory, else in float32, else
        the module itself."""
        numbers = sum(parameter.numel() for parameter in self.source.parameters())
        for dtype in (torch.float64, torch.float32):
            if numbers * dtype.itemsize <= self._room:
                return copy.deepcopy(self.source).to(dtype)
        return self.source

    @property
    def _room(self) -> float:
        if self.case.device == "cpu":
            return math.inf
        return torch.cuda.get_device_properties(0).total_memory / 4

    @property
    def truth_dtype(self) -> str:
        return str(next(self._truth.parameters()).dtype).removeprefix("torch.")

    @torch.no_grad()
    def _truth_of(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """By transformers' module on one row, its logits in float64: the log-probabilities of all
        tokens at every place of a completion [T, V], and those of its own tokens [T]."""
        ids = torch.tensor([[*prompt, *tokens]], device=self.case.device)
        logits = self._truth(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        return logprobs, logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def _have_lengths(completions: Completions, limits: Sequence[int]) -> bool:
    rows = [completions.token_ids]
    if completions.logprobs is not None:
        rows.append(completions.logprobs)  # type: ignore[arg-type]
    return all([len(row) for row in entries] == list(limits) for entries in rows)


def make_prompts(requests: Workload, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(_SEED)
    shape = (requests.num_requests, requests.prompt_length)
    return torch.randint(vocab_size, shape, generator=generator).tolist()


def make_limits(requests: Workload) -> list[int]:
    """New tokens of each request."""
    longest = requests.max_new_tokens
    if requests.median_new_tokens is None:
        return [longest] * requests.num_requests
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(requests.num_requests, generator=generator).mul(_SPREAD).exp()
    return (drawn * requests.median_new_tokens).round().long().clamp(1, longest).tolist()

"""Who generates: ours, transformers' generate, and its continuous batching."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import torch

from fuserl.bench.rivals import load
from fuserl.bench.rollout_problem import Completions, RolloutProblem
from fuserl.model.notes import FolderNotes
from fuserl.policy import Policy

_BATCH = 32  # rows of one call of `generate`
_PAGE = 256  # tokens; continuous batching's own default
_BATCH_TOKENS = 2048  # of one step of continuous batching: room for the prompts of 32 requests


class Generator(Protocol):
    """A model that completes prompts, each up to its own limit."""

    note: str
    """What a reader of its numbers should know, or nothing."""

    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], *, greedy: bool = False
    ) -> Completions:
        """Without greedy: sampled at temperature 1 from the whole vocabulary."""

    @property
    def kv_bytes(self) -> int | None:
        """Of the cache in the last call; None where it is not told."""


class FuserlGenerator:
    """Policy.generate on the model that trains."""

    note = ""

    def __init__(self, problem: RolloutProblem) -> None:
        self._policy = Policy(problem.our_model(), None, FolderNotes(), problem.case.model)
        self._kv_bytes: int | None = None

    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], *, greedy: bool = False
    ) -> Completions:
        found = self._policy.generate(
            prompts,
            max_new_tokens=limits,
            temperature=0.0 if greedy else 1.0,
            ignore_eos=True,
        )
        self._kv_bytes = found.kv_bytes
        return Completions(found.token_ids, found.logprobs)

    @property
    def kv_bytes(self) -> int | None:
        return self._kv_bytes


class TransformersGenerate:
    """LlamaForCausalLM.generate on padded batches in the given order, each run to its longest
    limit. The log-probabilities are those of the scores it returns."""

    def __init__(self, problem: RolloutProblem, *, with_logprobs: bool) -> None:
        self._problem, self._with_logprobs = problem, with_logprobs
        self._model = problem.source
        self._config = load("transformers", "GenerationConfig")
        self._kv_bytes = 0
        self.note = "" if with_logprobs else "no log-probabilities"

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], *, greedy: bool = False
    ) -> Completions:
        token_ids: list[list[int]] = []
        logprobs: list[list[float]] = []
        self._kv_bytes = 0
        for first in range(0, len(prompts), _BATCH):
            part, ends = prompts[first : first + _BATCH], limits[first : first + _BATCH]
            new_ids, new_logprobs = self._run(part, max(ends), greedy)
            token_ids += [row[:end] for row, end in zip(new_ids, ends, strict=True)]
            logprobs += [row[:end] for row, end in zip(new_logprobs, ends, strict=True)]
        return Completions(token_ids, logprobs if self._with_logprobs else None)

    def _run(
        self, prompts: Sequence[list[int]], num_tokens: int, greedy: bool
    ) -> tuple[list[list[int]], list[list[float]]]:
        width = max(map(len, prompts))
        padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = self._problem.case.device
        config = _generation_config(self._config, num_tokens, greedy)
        config.return_dict_in_generate, config.output_scores = True, self._with_logprobs
        found = self._model.generate(
            input_ids=padded.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
        )
        room = self._problem.kv_bytes(len(prompts) * (width + num_tokens))
        self._kv_bytes = max(self._kv_bytes, room)
        new_ids = found.sequences[:, width:]
        if not self._with_logprobs:
            return new_ids.tolist(), [[]] * len(prompts)
        # Step by step: transformers' compute_transition_scores holds all scores twice more.
        steps = [
            scores.log_softmax(-1).gather(1, drawn[:, None])
            for scores, drawn in zip(found.scores, new_ids.T, strict=True)
        ]
        return new_ids.tolist(), torch.cat(steps, dim=1).tolist()

    @property
    def kv_bytes(self) -> int | None:
        return self._kv_bytes


class StaticGenerate(TransformersGenerate):
    """With a cache of fixed size, for which transformers compiles the step on a GPU."""

    def __init__(self, problem: RolloutProblem) -> None:
        super().__init__(problem, with_logprobs=True)
        self._config = partial(self._config, cache_implementation="static")
        self.note = "static cache"


class ContinuousBatching:
    """transformers' continuous batching with log-probabilities: all requests at once.

    Its manager and the pages of its cache are kept between calls, and no page outlives its
    request: in training, weights change from one call to the next.
    """

    def __init__(self, problem: RolloutProblem) -> None:
        """Raises Unavailable without it."""
        self._model = problem.their_copy()  # its attention is another from then on
        self._config = load("transformers", "GenerationConfig")
        requests = problem.case.requests
        pages = -(-(requests.prompt_length + requests.max_new_tokens) // _PAGE)
        make = load("transformers", "ContinuousBatchingConfig")
        # Named block_size up to transformers 5.17.
        name = "page_size" if any(f.name == "page_size" for f in fields(make)) else "block_size"
        self._batching = make(
            return_logprobs=True,
            seed=0,
            allow_block_sharing=False,
            num_blocks=pages * requests.num_requests,
            max_batch_tokens=_BATCH_TOKENS,
            **{name: _PAGE},
        )
        self._max_new_tokens = requests.max_new_tokens
        self._kv_bytes = problem.kv_bytes(_PAGE * pages * requests.num_requests)
        self.note = "its cache is no part of the peak"

    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], *, greedy: bool = False
    ) -> Completions:
        if greedy:  # a kept manager samples
            self._model.destroy_cached_continuous_batching_manager()
        config = _generation_config(self._config, self._max_new_tokens, greedy)
        config.eos_token_id = -1  # none
        with self._model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=self._batching,
            persistent_manager=not greedy,
            warmup=False,  # of CUDA graphs
        ) as manager:
            names = [
                manager.add_request(list(prompt), max_new_tokens=limit)
                for prompt, limit in zip(prompts, limits, strict=True)
            ]
            found = _collect(manager, len(names))
        rows = [found[name] for name in names]
        return Completions([r.generated_tokens for r in rows], [r.logprobs for r in rows])

    @property
    def kv_bytes(self) -> int | None:
        return self._kv_bytes


def _collect(manager: Any, number: int) -> dict[str, Any]:
    """Finished requests by name. Raises RuntimeError if one failed or the manager stopped."""
    found: dict[str, Any] = {}
    while len(found) < number:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("continuous batching stopped before its requests had ended")
        elif result.error is not None:
            raise RuntimeError(f"a request failed: {result.error}")
        elif result.is_finished():
            found[result.request_id] = result
    return found


def _generation_config(make: Callable[..., Any], num_tokens: int, greedy: bool) -> Any:
    """Sampling without any truncation, or greedy."""
    sampling = {} if greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return make(max_new_tokens=num_tokens, do_sample=not greedy, pad_token_id=0, **sampling)


OURS = "fuserl"
BASELINE = "generate"

PROVIDERS: dict[str, Callable[[RolloutProblem], Generator]] = {
    OURS: FuserlGenerator,
    BASELINE: lambda problem: TransformersGenerate(problem, with_logprobs=True),
    "generate-tokens": lambda problem: TransformersGenerate(problem, with_logprobs=False),
    "continuous": ContinuousBatching,
}
"""On the same weights. generate-tokens leaves the log-probabilities to a pass of their own."""

ON_CUDA: dict[str, Callable[[RolloutProblem], Generator]] = {"generate-static": StaticGenerate}
"""Beside these, where there is a GPU."""

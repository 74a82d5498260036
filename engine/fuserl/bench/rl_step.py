"""One step of PPO, phase by phase, as three whole models and as a hydra: `fuserl bench rl_step`.

Half the layers are frozen in both. naive: the reference and the critic run whole beside the
policy. hydra: both are tops on the stream that the rollout keeps, and so is the policy in the
update. The two compute the same; that is checked before anything is timed.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fuserl.batch import ShapedBatch
from fuserl.bench.case import DTYPES
from fuserl.bench.memory import peak_extra_bytes, why_not_measured
from fuserl.bench.output import WrongAnswer, models_of, refuse_other_options, run_cases
from fuserl.bench.timing import as_milliseconds, interleave, quartiles
from fuserl.bench.training_problem import MODELS
from fuserl.config import BenchConfig, RLConfig
from fuserl.data.examples import Prompt
from fuserl.device import default_device
from fuserl.model.flops import pass_of, step_flops, update_passes
from fuserl.model.freezing import freeze_lowest
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.hydra import critic_on, frozen_copy, share_trunk
from fuserl.optimizer import Optimizer
from fuserl.stages.rl_metrics import Clock, lengths_of
from fuserl.stages.rl_models import RLModels
from fuserl.stages.rl_step import Learner, experience, learn

NAME = "rl_step"
BASELINE = "naive"
PROVIDERS = (BASELINE, "hydra")
PHASES = ("rollout", "score", "update")
_MEASURED = ("3M", "25M")
_OPTIONS = {"op", "device", "dtype", "model", "rounds", "budget_seconds", "threads", "json"}
_APART = {"fp32": 1e-4, "bf16": 0.15}  # of log-probabilities and values, for any token
_UNITS = """\
Seconds, median [quartiles] of interleaved rounds; vs naive: its median over this one. FLOPs: of
score and update, by the formula of model/flops.py. state: weights, masters and moments, each once.
peak: most memory during a step beyond the state. kept: the stream that the rollout keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RLCase:
    """One model and dtype; the lower half of its layers is frozen."""

    model: str  # a key of MODELS
    dtype: str
    device: str
    num_prompts: int = 4
    num_samples: int = 2
    max_new_tokens: int = 32
    num_epochs: int = 4

    @property
    def title(self) -> str:
        return f"PPO step, {self.model}, half the layers frozen, {self.dtype} {self.device}"


@dataclass(slots=True)
class RLResult:
    provider: str
    state_bytes: int
    kept_bytes: int
    flops: int
    apart: float  # from naive: the largest difference of a log-probability or a value
    peak_extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by phase


class RLStep:
    """Models, optimizer and the phases of one step (a Call of timing.interleave)."""

    def __init__(self, case: RLCase, provider: str) -> None:
        sizes = MODELS[case.model]
        self.case, depth = case, sizes.num_layers // 2
        self.config = RLConfig(
            model=case.model,
            data="",
            out="",
            batch_size=case.num_prompts,
            num_samples=case.num_samples,
            max_new_tokens=case.max_new_tokens,
            num_epochs=case.num_epochs,
            temperature=1.0,
            learning_rate=1e-6,  # every round sees the same model, nearly
            schedule="constant",
        )
        self.policy = LanguageModel(sizes)
        self.policy.initialize(0)
        self.policy.to(device=case.device, dtype=DTYPES[case.dtype])
        if provider == BASELINE:
            # As they would be loaded: nothing shared.
            self.reference = frozen_copy(self.policy)
            self.critic = ScalarModel.on_trunk(self.policy, 1)
            freeze_lowest(self.critic, depth)
            freeze_lowest(self.policy, depth)
        else:
            freeze_lowest(self.policy, depth)
            self.reference = frozen_copy(self.policy)
            self.critic = critic_on(self.policy, 1)
            share_trunk(depth, self.policy.trunk, self.reference.trunk, self.critic.trunk)
        self._prompts = make_prompts(case, sizes.vocab_size)
        scores = torch.linspace(-1, 1, len(self._prompts), device=case.device)
        modules = {"policy": self.policy, "critic": self.critic}
        self._learner = Learner(
            policy=self.policy,
            models=RLModels(self.reference, lambda *_: scores, self.critic),
            optimizer=Optimizer(modules, self.config, total_steps=1_000_000),
            config=self.config,
        )
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def prepare(self) -> None:
        """Nothing is used up."""

    def run(self) -> ShapedBatch:
        clock = Clock()
        shaped = experience(self._learner, self._prompts, step=0, clock=clock)
        learn(self._learner, shaped, step=0, clock=clock)
        for phase, seconds in self.seconds.items():
            seconds.append(clock.seconds[phase])
        return shaped

    def answer(self) -> ShapedBatch:
        """Everything but the update."""
        return experience(self._learner, self._prompts, step=0, clock=Clock())

    @property
    def state_bytes(self) -> int:
        """Parameters, each once, and what the optimizer holds."""
        models = (self.policy, self.reference, self.critic)
        tensors: list[Tensor] = [p for model in models for p in model.parameters()]
        tensors += self._learner.optimizer.state().values()
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    def flops(self, batch: ShapedBatch) -> int:
        """Of score and update."""
        found = step_flops(
            lengths_of(batch, self.config),
            scored=[pass_of(self.reference), pass_of(self.critic)],
            updated=update_passes(self.policy, self.critic),
            num_epochs=self.config.passes,
        )
        return found.hydra if self.policy.trunk.shared_layers else found.naive


def make_prompts(case: RLCase, vocab_size: int) -> list[Prompt]:
    """Log-normal lengths (median 96, at most 256 tokens), each prompt num_samples times."""
    generator = torch.Generator().manual_seed(0)
    longest = min(256, MODELS[case.model].max_positions - case.max_new_tokens)
    prompts = []
    for _ in range(case.num_prompts):
        length = math.exp(math.log(96) + 0.6 * torch.randn((), generator=generator).item())
        size = (max(1, min(round(length), longest)),)
        ids = torch.randint(vocab_size, size, generator=generator).tolist()
        prompts += [Prompt(tuple(ids), "", {}, "")] * case.num_samples
    return prompts


@dataclass(frozen=True, slots=True)
class RLReport:
    case: RLCase
    num_tokens: int
    num_completion_tokens: int
    results: list[RLResult]

    def table(self) -> str:
        """In Markdown."""
        heads = [*PHASES, "score and update", "FLOPs", "state MB", "kept MB", "peak MB"]
        lines = [
            f"{self.case.title}: {self.num_tokens} tokens, {self.num_completion_tokens} sampled\n",
            f"| | {' | '.join(heads)} |",
            f"|---|{'--:|' * len(heads)}",
        ]
        (naive,) = [result for result in self.results if result.provider == BASELINE]
        for result in self.results:
            cells = [result.provider]
            for phase in (*PHASES, ""):
                ours, theirs = (_milliseconds(r, phase) for r in (result, naive))
                low, median, high = quartiles(ours)
                ratio = quartiles(theirs)[1] / median
                spread = "[{}, {}]".format(*map(as_milliseconds, (low, high)))
                cells.append(f"{as_milliseconds(median)} ms {spread} {ratio:.2f}x")
            peak = result.peak_extra_bytes
            cells += [
                f"{result.flops / 1e9:.1f}G ({1 - result.flops / naive.flops:.0%} saved)",
                f"{result.state_bytes / 1e6:.0f}",
                f"{result.kept_bytes / 1e6:.1f}",
                "-" if peak is None else f"{peak / 1e6:.0f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        medians = {
            result.provider: {phase: quartiles(s)[1] for phase, s in result.seconds.items()}
            for result in self.results
        }
        return asdict(self) | {"median_seconds": medians}


def _milliseconds(result: RLResult, phase: str) -> list[float]:
    """Of a phase; "": of score and update together."""
    if phase:
        return [1e3 * s for s in result.seconds[phase]]
    both = zip(result.seconds["score"], result.seconds["update"], strict=True)
    return [1e3 * (a + b) for a, b in both]


def run_rl_step(config: BenchConfig) -> list[RLReport]:
    """Print the tables and write the JSON that was asked for.

    Raises ValueError for an option that would do nothing, and WrongAnswer.
    """
    return run_cases(config, cases_of(config), run_case, _UNITS)


def cases_of(config: BenchConfig) -> list[RLCase]:
    refuse_other_options(config, _OPTIONS, NAME)
    if config.dtype not in ("auto", *_APART):
        raise ValueError(f"dtype of {NAME} must be one of {(*_APART,)}, not {config.dtype!r}")
    device = default_device(None if config.device == "auto" else config.device).type
    return [
        RLCase(model=model, dtype=dtype, device=device)
        for model in models_of(config, _MEASURED, NAME)
        for dtype in (_APART if config.dtype == "auto" else (config.dtype,))
    ]


def run_case(case: RLCase, rounds: int, budget_seconds: float) -> RLReport:
    """Compare the two, then time whole steps, interleaved."""
    steps = {provider: RLStep(case, provider) for provider in PROVIDERS}
    answers = {provider: step.answer() for provider, step in steps.items()}
    naive = answers[BASELINE]
    results = {}
    for provider, step in steps.items():
        batch = answers[provider]
        apart = _apart(batch, naive)
        if not apart <= _APART[case.dtype]:
            raise WrongAnswer(
                f"{case.title}: nothing was timed, because {provider} is {apart:.1e} "
                f"from {BASELINE}"
            )
        step.run()  # makes the moments
        kept = 0 if batch.trunk_states is None else batch.trunk_states.nbytes
        result = RLResult(provider, step.state_bytes, kept, step.flops(batch), apart)
        if why_not_measured(case.device) is None:
            result.peak_extra_bytes = peak_extra_bytes(case.device, step.run)
        step.seconds = {phase: [] for phase in PHASES}
        results[provider] = result
    for provider, samples in interleave(case.device, steps, rounds, budget_seconds).items():
        results[provider].samples_ms = samples
        results[provider].seconds = steps[provider].seconds
    num_completion_tokens = int(naive.completion_lengths.sum())
    num_tokens = int(naive.prompt_lengths.sum()) + num_completion_tokens
    return RLReport(case, num_tokens, num_completion_tokens, list(results.values()))


def _apart(ours: ShapedBatch, theirs: ShapedBatch) -> float:
    """Infinite where other tokens were sampled."""
    if not torch.equal(ours.completions, theirs.completions):
        return math.inf
    assert ours.values is not None
    assert theirs.values is not None
    assert ours.ref_logprobs is not None
    assert theirs.ref_logprobs is not None
    mask = theirs.loss_mask
    differences = [
        (ours.ref_logprobs - theirs.ref_logprobs)[mask],
        (ours.values - theirs.values)[mask],
    ]
    return float(torch.cat(differences).abs().max())

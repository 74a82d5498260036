"""Whole steps of PPO and GRPO on real model shapes, phase by phase, against their limits.

Weights and prompts are random and lengths fixed (nothing but the limit ends a completion), so that
the work of every step is the same and known. ppo has a reference, a critic and a reward model of
the policy's own shape; grpo has a reference and a function of the token ids on the device. Every
step samples anew from the weights that the one before left. The first step is apart: in it kernels
are compiled and decode steps captured.

What fits is estimated before it is tried (estimated_bytes), in bytes:

    trained weight (policy, critic)    18: bf16, fp32 master, gradient and two moments (fp32: 16)
    frozen weight (reference, reward)  2 (fp32: 4)
    token in the cache                 layers x 2 x key heads x head size x 2; of a prompt once for
                                       all its samples; it stays while training
    token of a microbatch              layers x what a layer keeps for its backward pass; with
                                       activation checkpointing layers x the residual stream's two
                                       tensors, and one whole layer
    head                               a chunk of logits, and an fp32 gradient on its way to be
                                       added

For 256 completions of 512 tokens Qwen3-0.6B so takes 54 GB for GRPO and 67 GB for PPO, Qwen2.5-1.5B
56 GB and, with activation checkpointing, 73 GB: they fit a card of 80 GB (a cache that does not
find its room has fewer slots). A full fine-tune of an 8B model through fp32 masters and Adam fits
neither there nor in 141 GB: its 8.0 billion trained weights alone take 145 GB. It needs several
devices, or adapters.
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fuserl.batch import RolloutBatch
from fuserl.bench.case import DTYPES
from fuserl.bench.decode_steps import MODELS
from fuserl.bench.phase_costs import phase_costs
from fuserl.bench.phases import UNITS, PhaseClock, PhaseResult, phase_results, phase_table
from fuserl.bench.timing import Ceilings
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.model.config import DecoderConfig
from fuserl.model.flops import Lengths, layer_weights
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.hydra import frozen_copy
from fuserl.optimizer import Optimizer
from fuserl.rewards import ModelReward, Reward
from fuserl.rollout.engine import RolloutFacts
from fuserl.rollout.memory import is_out_of_memory
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.stages.rl_metrics import Clock, lengths_of
from fuserl.stages.rl_models import RLModels
from fuserl.stages.rl_step import Learner, experience, learn

__all__ = ["UNITS", "PhasesCase", "PhasesReport", "estimated_bytes", "phase_cases", "run_case"]

MIN_STEPS, MAX_STEPS = 3, 10
_LOGITS_BYTES = 1 << 30  # the chunk that the heads' ops share, and the sampler's, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasesCase:
    """One model, algorithm and size of step."""

    model: str
    """A key of MODELS."""
    algorithm: Literal["ppo", "grpo"]
    num_prompts: int
    num_samples: int
    """Completions of each prompt; grpo needs two."""
    prompt_length: int = 512
    max_new_tokens: int = 512
    microbatch_size: int = 8
    num_epochs: int = 1
    """Passes over the rollout, one optimizer step each."""
    activation_checkpointing: bool = False
    dtype: str = "bf16"
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {(*MODELS,)}, got {self.model!r}")
        if self.dtype not in ("bf16", "fp32"):
            raise ValueError(f"dtype must be bf16 or fp32, got {self.dtype!r}")

    @property
    def title(self) -> str:
        recomputing = ", activations checkpointed" if self.activation_checkpointing else ""
        return (
            f"{self.algorithm} step, {self.model}, {self.num_prompts} prompts of "
            f"{self.prompt_length} x {self.num_samples} samples of {self.max_new_tokens} tokens, "
            f"microbatches of {self.microbatch_size}{recomputing}, {self.dtype} {self.device}"
        )

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.num_samples

    @property
    def lengths(self) -> Lengths:
        prompts, completions = (
            [length] * self.num_sequences for length in (self.prompt_length, self.max_new_tokens)
        )
        return Lengths(prompts, completions, self.num_samples)


def phase_cases() -> list[PhasesCase]:
    """The most wanted first: 256 completions a step, on one card of 80 GB."""

    def grpo(model: str, **options: Any) -> PhasesCase:
        return PhasesCase(model=model, algorithm="grpo", num_prompts=32, num_samples=8, **options)

    def ppo(model: str, **options: Any) -> PhasesCase:
        return PhasesCase(model=model, algorithm="ppo", num_prompts=256, num_samples=1, **options)

    small, large = "Qwen3-0.6B", "Qwen2.5-1.5B"
    return [
        grpo(small, microbatch_size=16),
        ppo(small),
        grpo(large),
        ppo(large, activation_checkpointing=True),
        grpo(small, microbatch_size=64, activation_checkpointing=True),
    ]


def estimated_bytes(case: PhasesCase) -> int:
    """See the module's docstring."""
    config, size = MODELS[case.model], DTYPES[case.dtype].itemsize
    num_models = 2 if case.algorithm == "ppo" else 1
    trained = 4 * 4 + (size if size < 4 else 0)
    weights = num_models * num_parameters(config) * (trained + size)
    kv_bytes = 2 * size * config.num_layers * config.num_kv_heads * config.head_dim
    cached = case.num_prompts * case.prompt_length + case.num_sequences * case.max_new_tokens
    length = case.prompt_length + case.max_new_tokens
    tokens = length * min(case.microbatch_size, case.num_sequences)
    layer, stream = _kept_of_a_layer(config), 2 * config.hidden_size
    layers = config.num_layers
    kept = layers * stream + layer if case.activation_checkpointing else layers * layer
    head = _LOGITS_BYTES + 4 * config.hidden_size * config.vocab_size
    return weights + kv_bytes * cached + size * kept * tokens + head


def num_parameters(config: DecoderConfig) -> int:
    """Of the matrices, which is nearly all."""
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return config.num_layers * layer_weights(config) + embeddings


def _kept_of_a_layer(config: DecoderConfig) -> int:
    """Numbers a token: both norms' outputs and the streams they read with the branches added to
    them; the joint query, key and value before and after the rotation, and what attention gives;
    gate, up, and their product."""
    heads = config.num_heads * config.head_dim
    joint = heads + 2 * config.num_kv_heads * config.head_dim
    return 6 * config.hidden_size + 2 * joint + heads + 3 * config.intermediate_size


@dataclass(slots=True)
class PhasesReport:
    case: PhasesCase
    ceilings: Ceilings
    estimated_bytes: int
    num_parameters: int = 0
    """Of the policy."""
    num_slots: int = 0
    """Completions sampled at a time."""
    first_step_seconds: float | None = None
    capture_seconds: float | None = None
    """Of decode steps, in the first step."""
    results: list[PhaseResult] = field(default_factory=list)
    reason: str = ""
    """Why it was not timed, or not to the end."""

    def table(self) -> str:
        """In Markdown."""
        told = [
            f"{self.num_parameters / 1e6:,.1f}M parameters",
            f"{self.num_slots} completions at a time",
            f"estimated {self.estimated_bytes / 1e9:.1f} GB",
        ]
        if self.first_step_seconds is not None:
            told.append(f"first step {self.first_step_seconds:.1f} s")
        if self.capture_seconds is not None:
            told.append(f"captures in it {self.capture_seconds:.1f} s")
        lines = [f"{self.case.title}: {', '.join(told)}\n{self.ceilings}"]
        if self.results:
            lines.append(f"\n{phase_table(self.results, self.ceilings)}")
        if self.reason:
            lines.append(f"\n{self.reason}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        found = [result.to_json(self.ceilings) for result in self.results]
        return asdict(self) | {"results": found}


def run_case(case: PhasesCase, ceilings: Ceilings, seconds: float) -> PhasesReport:
    """Time whole steps after a first one: three at least, more while there are seconds. Where
    memory runs out it says so; what was timed before stays."""
    report = PhasesReport(case, ceilings, estimated_bytes(case))
    timed: list[dict[str, float]] = []
    peaks: dict[str, int] = {}
    clock, steps = Clock(), None
    try:
        steps = _Steps(case)
        report.num_parameters = sum(p.numel() for p in steps.learner.policy.parameters())
        clock = steps.clock(measures_memory=False)
        steps.take(clock)
        report.first_step_seconds = sum(clock.seconds.values())
        report.num_slots, report.capture_seconds = steps.num_slots, steps.capture_seconds
        deadline = perf_counter() + seconds
        while len(timed) < MIN_STEPS or (len(timed) < MAX_STEPS and perf_counter() < deadline):
            clock = steps.clock(measures_memory=case.device == "cuda")  # it costs nothing there
            steps.take(clock)
            timed.append(clock.seconds)
            _keep_largest(peaks, clock)
        if case.device != "cuda":
            clock = steps.clock(measures_memory=True)
            steps.take(clock)
            _keep_largest(peaks, clock)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        where = f"in {clock.phase}" if clock.phase else "before the first step"
        report.reason = f"out of memory {where}, after {len(timed)} timed steps"
    if steps is not None and timed:
        costs = phase_costs(steps.learner, case.lengths, report.num_slots)
        num_tokens = case.num_sequences * case.max_new_tokens
        report.results = phase_results(timed, costs, num_tokens, peaks, ceilings)
    del steps
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return report


def _keep_largest(peaks: dict[str, int], clock: Clock) -> None:
    if isinstance(clock, PhaseClock):
        for phase, found in clock.peak_bytes.items():
            peaks[phase] = max(found, peaks.get(phase, 0))


class _Steps:
    """Models, optimizer and prompts of a case, and the steps taken so far."""

    def __init__(self, case: PhasesCase) -> None:
        self._case, self._taken = case, 0
        self._facts = RolloutFacts()
        policy = _on_device(LanguageModel, case, 0)
        policy.trunk.checkpointing = case.activation_checkpointing
        modules: dict[str, nn.Module] = {"policy": policy}
        critic: ScalarModel | None = None
        reward: Reward = _share_of_even_ids
        if case.algorithm == "ppo":
            judge = _on_device(ScalarModel, case, 1).requires_grad_(False)
            microbatch_size = case.microbatch_size
            reward = ModelReward(judge, microbatch_size=microbatch_size, at_tokens=False)
            modules["critic"] = critic = _on_device(ScalarModel, case, 2)
            critic.trunk.checkpointing = case.activation_checkpointing
        config = _config_of(case)
        self.learner = Learner(
            policy=policy,
            models=RLModels(frozen_copy(policy), reward, critic),
            optimizer=Optimizer(modules, config, total_steps=config.steps * config.passes),
            config=config,
        )
        generator = torch.Generator().manual_seed(0)
        sizes = (case.num_prompts, case.prompt_length)
        ids = torch.randint(policy.config.vocab_size, sizes, generator=generator).tolist()
        prompts = [Prompt(tuple(row), "", {}, "") for row in ids]
        self._prompts = [prompt for prompt in prompts for _ in range(case.num_samples)]

    def clock(self, *, measures_memory: bool) -> Clock:
        return PhaseClock(self._case.device) if measures_memory else Clock()

    def take(self, clock: Clock) -> None:
        step, learner = self._taken, self.learner
        shaped = experience(learner, self._prompts, step=step, clock=clock, facts=self._facts)
        learn(learner, shaped, step=step, clock=clock)
        expected = self._case.lengths
        assert lengths_of(shaped, learner.config) == expected, "the work was not as told"
        self._taken += 1

    @property
    def num_slots(self) -> int:
        return self._facts.num_slots

    @property
    def capture_seconds(self) -> float | None:
        runner = self.learner.memory.kept
        if not isinstance(runner, ModuleRunner) or runner.graphs is None:
            return None
        return runner.graphs.seconds


ModelT = TypeVar("ModelT", LanguageModel, ScalarModel)


def _on_device(kind: type[ModelT], case: PhasesCase, seed: int) -> ModelT:
    with torch.device("meta"):
        model = kind(MODELS[case.model]).to(DTYPES[case.dtype])
    model.to_empty(device=case.device)
    model.initialize(seed)
    return model


def _share_of_even_ids(batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
    """The reward of grpo."""
    return (batch.completions % 2 == 0).float().mean(1)


def _config_of(case: PhasesCase) -> RLConfig:
    return RLConfig(
        model=case.model,
        data="",
        out="",
        algorithm=case.algorithm,
        preset="trl",
        steps=MAX_STEPS + 2,
        batch_size=case.num_prompts,
        num_samples=case.num_samples,
        num_epochs=case.num_epochs,
        microbatch_size=case.microbatch_size,
        max_new_tokens=case.max_new_tokens,
        max_prompt_length=case.prompt_length,
        temperature=1.0,
        kl_coef=0.05,  # there is a reference
        learning_rate=1e-6,
        schedule="constant",
        activation_checkpointing=case.activation_checkpointing,
    )

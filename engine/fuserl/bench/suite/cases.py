"""What each part of the suite times, most wanted first, and which ops a number rests on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fuserl.bench import decode_steps, report, rl_phases, rollout
from fuserl.bench.case import Case
from fuserl.bench.decode_steps import StepCase
from fuserl.bench.op import Provider
from fuserl.bench.ops import providers
from fuserl.bench.output import Table
from fuserl.bench.rl_phases import PhasesCase
from fuserl.bench.rollout_problem import WORKLOADS, RolloutCase, Workload
from fuserl.bench.run import run_case
from fuserl.bench.suite.proof import Proof, in_cuda
from fuserl.bench.timing import Ceilings

AnyCase = Case | StepCase | RolloutCase | PhasesCase

ROUNDS = 20
ROLLOUT_ROUNDS = 5
NUM_ROWS = 8192
VOCAB_SIZES = (32_000, 128_256, 151_936)

DECODING = (
    "sample_tokens",
    "advance_rows",
    "decode_attention_plan",
    "rms_norm",
    "rotary",
    "rotary_kv_write",
    "decode_attention",
    "glu",
    "rollout",
)
TRAINING = (
    "linear_token_logprobs",
    "linear_policy_loss",
    "rewards_to_advantages",
    "shape_rewards",
    "masked_whiten",
    "value_loss",
)


def needs(case: AnyCase) -> tuple[str, ...]:
    """The ops (and "rollout") whose tests must be green for this case's numbers to be shown."""
    if isinstance(case, Case):
        return (case.op,)
    return DECODING if isinstance(case, StepCase | RolloutCase) else (*DECODING, *TRAINING)


# --- ops


def _rows(op: str, pass_name: str, hidden_size: int, vocab_size: int, **options: Any) -> Case:
    """Of an op on logits, hidden states or what a layer holds."""
    return Case(
        op=op,
        pass_name=pass_name,
        device="cuda",
        dtype="bf16",
        num_rows=NUM_ROWS,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        **options,
    )


def _logit_cases() -> list[Case]:
    """The three ops at the vocabulary, at the sizes of the published rivals."""

    def rows(pass_name: str, vocab_size: int, **options: bool) -> Case:
        return _rows("token_logprobs", pass_name, 0, vocab_size, **options)

    def linear(pass_name: str, hidden_size: int, vocab_size: int, **options: bool) -> Case:
        return _rows("linear_token_logprobs", pass_name, hidden_size, vocab_size, **options)

    def loss(hidden_size: int, vocab_size: int, **options: bool) -> Case:
        return _rows("linear_policy_loss", "forward_backward", hidden_size, vocab_size, **options)

    both = "forward_backward"
    cases = [
        rows("forward", 128_256),
        rows(both, 128_256, inplace_grad=True),
        loss(4096, 128_256),
        linear("forward", 4096, 128_256),
        loss(1024, 128_256),
        linear(both, 4096, 128_256),
    ]
    for vocab_size in (32_000, 151_936):
        cases += [rows("forward", vocab_size), rows(both, vocab_size, inplace_grad=True)]
        cases += [linear("forward", 4096, vocab_size), loss(4096, vocab_size)]
    cases += [
        linear("forward", 1024, 128_256),
        rows("forward", 128_256, with_entropy=True),
        rows(both, 128_256),
        linear(both, 1024, 128_256),
        loss(4096, 128_256, with_entropy=True),
        linear("forward", 4096, 128_256, with_entropy=True),
    ]
    for vocab_size in (32_000, 151_936):
        cases += [loss(1024, vocab_size), linear("forward", 1024, vocab_size)]
        cases += [linear(both, hidden_size, vocab_size) for hidden_size in (4096, 1024)]
    return cases


def _token_cases() -> list[Case]:
    """The ops between scores and gradients, and sampling."""

    def tokens(op: str, pass_name: str = "forward") -> Case:
        return Case(
            op=op,
            pass_name=pass_name,
            device="cuda",
            dtype="fp32",
            num_sequences=512,
            num_slots=1024,
        )

    def samples(top_p: float, num_rows: int = 256) -> Case:
        case = _rows("sample_tokens", "forward", 0, 128_256, temperature=0.8, top_p=top_p)
        return replace(case, num_rows=num_rows)

    both = "forward_backward"
    pairs = Case(op="pairwise_loss", pass_name=both, device="cuda", dtype="fp32", num_rows=512)
    return [
        samples(0.95),
        samples(1.0),
        tokens("ppo_loss", both),
        tokens("rewards_to_advantages"),
        tokens("gae"),
        samples(0.95, 64),
        tokens("policy_loss", both),
        tokens("masked_whiten"),
        tokens("kl_penalty", both),
        tokens("value_loss", both),
        tokens("shape_rewards"),
        tokens("discounted_returns"),
        tokens("masked_moments"),
        pairs,
    ]


def _layer_cases() -> list[Case]:
    """What stands inside a decoder layer: Llama-3-8B's sizes."""
    attend = replace(
        _rows("decode_attention", "forward", 0, 0),
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        num_tokens=2048,
    )
    write = _rows("rotary_kv_write", "forward", 4096, 0)
    passes = ("forward", "forward_backward")
    return [
        replace(attend, num_rows=256),
        *(_rows("rms_norm", name, 4096, 0, with_residual=True) for name in passes),
        *(_rows("glu", name, 14_336, 0) for name in passes),
        *(_rows("rotary", name, 4096, 0) for name in passes),
        replace(write, num_rows=256),
        replace(attend, num_rows=16),
        *(_rows("rms_norm", name, 4096, 0) for name in passes),
        *(_rows("layer_norm", name, 4096, 0, with_residual=True) for name in passes),
    ]


def _replayed(cases: Sequence[Case]) -> list[Case]:
    """The same from a CUDA graph, the device's time alone, for what a launch is much of. A
    gradient in place uses up its inputs, which a graph keeps."""
    return [replace(case, cuda_graph=True) for case in cases]


def op_cases() -> list[Case]:
    """Of every op once at its most wanted size, then the rest in the same order."""
    logits, tokens, layer = _logit_cases(), _token_cases(), _layer_cases()
    cases = [*logits[:6], *tokens, *layer, *_replayed([*tokens[:5], *layer[:8]]), *logits[6:]]
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.op, case)
    return [*first.values(), *(case for case in cases if case is not first[case.op])]


# --- rollouts


LONG_PROMPTS = Workload(num_requests=64, prompt_length=512, max_new_tokens=128)


def rollout_cases() -> list[StepCase | RolloutCase]:
    """Steps of real shapes against their limit, and whole rollouts against transformers."""
    steps = decode_steps.step_cases()
    names = list(dict.fromkeys(case.model for case in steps))
    small = RolloutCase(
        model="big",
        workload="uniform",
        requests=WORKLOADS["uniform"],
        dtype="bf16",
        device="cuda",
    )
    rivals = [replace(small, model=name, requests=LONG_PROMPTS) for name in names]
    return [
        *steps[:3],
        rivals[0],
        *steps[3:6],
        rivals[1],
        *steps[6:9],
        small,
        *steps[9:],
        rivals[2],
    ]


# --- parts


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    cases: Callable[[], Sequence[AnyCase]]
    units: str
    """The words under its tables."""


PARTS = {
    part.name: part
    for part in (
        Part("ops", op_cases, report.units()),
        Part("rollouts", rollout_cases, f"{decode_steps.UNITS}\n{rollout.UNITS}"),
        Part("step", rl_phases.phase_cases, rl_phases.UNITS),
    )
}


def measure(case: AnyCase, ceilings: Ceilings, seconds: float, proof: Proof) -> Table:
    """seconds: of timed rounds; checks, captures and compilation come on top. Raises WrongAnswer,
    and Unavailable where what a case is compared to is not installed."""
    if isinstance(case, StepCase):
        return decode_steps.run_case(case, ceilings, seconds)
    if isinstance(case, RolloutCase):
        return rollout.run_case(case, ROLLOUT_ROUNDS, seconds)
    if isinstance(case, PhasesCase):
        return rl_phases.run_case(case, ceilings, seconds)
    return run_case(case, timed_providers(case.op, proof), ceilings, ROUNDS, seconds)


def timed_providers(op: str, proof: Proof) -> list[Provider]:
    """Not the reference: it is the definition, on a GPU it is slow, and the tests have judged by
    it. And CUDA C++, which runs only where it is asked for, not unless tests of its own are
    green."""
    unproven = {"reference"}
    if proof.why_red([in_cuda(op)]) is not None:
        unproven.add("native")
    return [provider for provider in providers(op) if provider.backend not in unproven]

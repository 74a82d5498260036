"""The ops between scores and gradients, and their rivals: `python -m pytest benchmarks`."""

from collections.abc import Callable

import pytest

from fuserl.bench.case import Case
from fuserl.bench.op import Provider
from fuserl.bench.ops import OPS, providers
from fuserl.device import default_device

TOKENS = {"num_sequences": 256, "num_slots": 512}
SIZES = {
    "gae": TOKENS,
    "rewards_to_advantages": TOKENS,
    "masked_whiten": TOKENS,
    "kl_penalty": TOKENS,
    "policy_loss": TOKENS,
    "ppo_loss": TOKENS,
    "pairwise_loss": {"num_rows": 512},
}
CASES = [
    Case(op=op, pass_name=pass_name, device=default_device().type, dtype="fp32", **sizes, **options)
    for op, sizes in SIZES.items()
    for pass_name in OPS[op].passes
    for options in ({}, {"with_metrics": True})
    if set(options) <= set(OPS[op].options)
]


@pytest.mark.parametrize(
    ("case", "provider"),
    [(case, provider) for case in CASES for provider in providers(case.op)],
    ids=lambda part: part.title if isinstance(part, Case) else part.name,
)
def test_token_op(
    time_provider: Callable[[Case, Provider], None], case: Case, provider: Provider
) -> None:
    time_provider(case, provider)

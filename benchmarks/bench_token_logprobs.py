"""fk.token_logprobs and its rivals: `python -m pytest benchmarks`."""

from collections.abc import Callable

import pytest

from fuserl.bench.case import PASSES, Case
from fuserl.bench.op import Provider
from fuserl.bench.ops import providers
from fuserl.device import default_device

OP = "token_logprobs"
SIZES = {"device": default_device().type, "num_rows": 512, "vocab_size": 32000, "hidden_size": 0}
CASES = [
    Case(op=OP, pass_name=pass_name, dtype=dtype, **SIZES, **options)
    for dtype in ("fp32", "bf16")
    for pass_name in PASSES
    for options in ({}, {"with_entropy": True}, {"inplace_grad": True})
    if dtype == "fp32" or not options
    if pass_name == "forward_backward" or "inplace_grad" not in options
]


@pytest.mark.parametrize("provider", providers(OP), ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_token_logprobs(
    time_provider: Callable[[Case, Provider], None], case: Case, provider: Provider
) -> None:
    time_provider(case, provider)

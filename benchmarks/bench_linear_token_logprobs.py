"""fk.linear_token_logprobs and its rivals: `python -m pytest benchmarks`."""

from collections.abc import Callable

import pytest

from fuserl.bench.case import PASSES, Case
from fuserl.bench.op import Provider
from fuserl.bench.ops import providers
from fuserl.device import default_device

OP = "linear_token_logprobs"
SIZES = {"num_rows": 256, "vocab_size": 32000, "hidden_size": 512}
CASES = [
    Case(op=OP, pass_name=pass_name, device=default_device().type, dtype=dtype, **SIZES)
    for dtype in ("fp32", "bf16")
    for pass_name in PASSES
]


@pytest.mark.parametrize("provider", providers(OP), ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_linear_token_logprobs(
    time_provider: Callable[[Case, Provider], None], case: Case, provider: Provider
) -> None:
    time_provider(case, provider)

"""fk.sample_tokens and its rivals: `python -m pytest benchmarks`."""

from collections.abc import Callable

import pytest

from fuserl.bench.case import Case
from fuserl.bench.op import Provider
from fuserl.bench.ops import providers
from fuserl.device import default_device

OP = "sample_tokens"
SIZES = {"device": default_device().type, "num_rows": 16, "vocab_size": 32000}
CASES = [
    Case(op=OP, pass_name="forward", dtype=dtype, temperature=0.8, top_p=top_p, **SIZES)
    for dtype in ("fp32", "bf16")
    for top_p in (1.0, 0.95)
]


@pytest.mark.parametrize("provider", providers(OP), ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_sample_tokens(
    time_provider: Callable[[Case, Provider], None], case: Case, provider: Provider
) -> None:
    time_provider(case, provider)

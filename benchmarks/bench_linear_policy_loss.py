"""fk.linear_policy_loss and its rivals: `python -m pytest benchmarks`."""

from collections.abc import Callable

import pytest

from fuserl.bench.case import Case
from fuserl.bench.op import Provider
from fuserl.bench.ops import providers
from fuserl.device import default_device

OP = "linear_policy_loss"
SIZES = {"num_rows": 256, "vocab_size": 32000, "hidden_size": 512}
CASES = [
    Case(
        op=OP,
        pass_name="forward_backward",
        device=default_device().type,
        dtype=dtype,
        with_entropy=with_entropy,
        **SIZES,
    )
    for dtype, with_entropy in (("fp32", False), ("fp32", True), ("bf16", False))
]


@pytest.mark.parametrize("provider", providers(OP), ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_linear_policy_loss(
    time_provider: Callable[[Case, Provider], None], case: Case, provider: Provider
) -> None:
    time_provider(case, provider)

"""What the kernel tests share: which implementations run here, the error rule, and opcheck."""

from collections.abc import Callable, Mapping

import torch

from fuserl_kernels import native, triton_runtime


def runnable(table: Mapping[str, Callable]) -> list[str]:
    """The implementations of an op that can run on this machine's CPU."""
    runs = {
        "reference": True,
        "native": native.why_absent() is None,
        "triton": triton_runtime.INTERPRETING,
    }
    return [name for name in table if runs[name]]


def widest(backend: str) -> torch.dtype:
    """The dtype in which an implementation is closest to the truth."""
    return torch.float64 if backend == "reference" else torch.float32


def assert_near(got: object, want: object) -> None:
    """torch.testing.assert_close, of one dtype, with room in float32 for sums in another order."""
    first = next(iter(want.values())) if isinstance(want, dict) else want
    near = {"atol": 1e-5, "rtol": 2e-5} if first.dtype == torch.float32 else {}
    torch.testing.assert_close(got, want, **near)


def assert_error_rule(
    ours: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor, tolerance: float
) -> None:
    """|ours - truth| may exceed the largest |peer - truth| by `tolerance` at most.

    truth is float64; peer is PyTorch's own result in the dtype of ours. Infinities must match."""
    assert not ours.isnan().any()
    finite = truth.isfinite()
    assert torch.equal(ours.double()[~finite], truth[~finite])
    error = (ours.double() - truth)[finite].abs()
    allowed = (peer.double() - truth)[finite].abs()
    if error.numel():
        assert error.max() <= allowed.max() + tolerance, (error.max(), allowed.max())


def opcheck(name: str, *arguments: object) -> None:
    """torch.library.opcheck of fuserl_kernels::name: schema, autograd, fake and compiled runs."""
    torch.library.opcheck(getattr(torch.ops.fuserl_kernels, name).default, arguments)


def ragged_mask(num_sequences: int, num_slots: int, holes: bool = False) -> torch.Tensor:
    """A bool mask [B, T] of sequences of different lengths, perhaps with holes; one row empty."""
    lengths = torch.randint(1, num_slots + 1, (num_sequences, 1))
    if num_sequences > 2:
        lengths[1] = 0
    mask = torch.arange(num_slots) < lengths
    return mask & (torch.rand(num_sequences, num_slots) > 0.3) if holes else mask

"""What a call on a GPU promises whatever it computes: no wait, and a place in a graph."""

from collections.abc import Callable, Sequence

import torch

Outputs = Sequence[torch.Tensor]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, but for those of NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_waits_for_nothing(call: Callable[[], Outputs]) -> None:
    """The host never waits for the device, also not for a check, once kernels are compiled."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_replays(call: Callable[[], Outputs], change: Callable[[], None]) -> None:
    """Captured on a stream of its own, and replayed twice on new inputs, it gives the bits of a
    call. A kernel on another stream than the current one would not be in the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call()
    for _ in range(2):
        change()
        graph.replay()
        torch.cuda.synchronize()
        found = [x.detach().clone() for x in captured]
        for a, b in zip(found, call(), strict=True):
            assert same(a, b.detach())

"""Sums over many programs in one launch, in a fixed order: the last program adds up what all left.

A program adds its own part in float64, leaves it in scratch memory and takes a ticket. Who holds
the last ticket finds all parts there, adds them in program order, finishes, and sets the counter
back to 0. Which program that is changes no bit, and nor does the device, since a launch has the
same programs everywhere: at most MAX_PROGRAMS.
"""

import torch

from fuserl_kernels.triton_runtime import INTERPRETING, tl, triton

MAX_PROGRAMS = 256  # two for each multiprocessor of a large GPU
NUM_SLOTS = 32  # sums of a program
TILE = 1024  # entries of a block, for the 256 threads of NUM_WARPS: four each, which lie together
NUM_WARPS = 8
_MAX_PROGRAMS = tl.constexpr(MAX_PROGRAMS)
_NUM_SLOTS = tl.constexpr(NUM_SLOTS)
_EACH = tl.constexpr(4)


@triton.jit
def _slots():  # type: ignore[no-untyped-def]
    """Numbers of the sums."""
    return tl.arange(0, _NUM_SLOTS)


@triton.jit
def _one(x, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile -> [TILE / 4], to be added up by a walk: each thread adds the four entries it holds.

    TOGETHER: they lie beside each other, as where four are loaded at once; else a quarter of the
    tile apart, as where starts are not aligned. The wrong choice costs time alone."""
    if TOGETHER:
        own = tl.sum(tl.reshape(x, (x.numel // _EACH, _EACH)), axis=1)
    else:
        own = tl.sum(tl.reshape(x, (_EACH, x.numel // _EACH)), axis=0)
    return own


@triton.jit
def _four(a, b, c, d, TOGETHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four tiles of one dtype -> [TILE / 4, 4] likewise. Threads meet in _leave only, once a
    program and for four sums at a time."""
    columns = tl.join(tl.join(a, c), tl.join(b, d))
    if TOGETHER:
        own = tl.sum(tl.reshape(columns, (a.numel // _EACH, _EACH, 4)), axis=1)
    else:
        own = tl.sum(tl.reshape(columns, (_EACH, a.numel // _EACH, 4)), axis=0)
    return own


@triton.jit
def _leave(partials_ptr, FIRST: tl.constexpr, columns):  # type: ignore[no-untyped-def]
    """Put the sums of columns [.., 4] where the last program finds them, from slot FIRST on."""
    offset = tl.program_id(0) * _NUM_SLOTS + FIRST
    sums = tl.sum(columns, axis=0).to(tl.float64)
    tl.store(partials_ptr + offset + tl.arange(0, 4), sums)


@triton.jit
def _leave_one(partials_ptr, SLOT: tl.constexpr, total):  # type: ignore[no-untyped-def]
    """Put a scalar there."""
    tl.store(partials_ptr + tl.program_id(0) * _NUM_SLOTS + SLOT, total.to(tl.float64))


@triton.jit
def _slot(sums, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of the collected sums, as a scalar."""
    return tl.sum(tl.where(_slots() == NUMBER, sums, 0.0), axis=0)


@triton.jit
def _is_last(ticket_ptr):  # type: ignore[no-untyped-def]
    """Take a ticket. True for the last program: the sums of all are visible to it."""
    # All threads have stored before one of them takes the ticket, whose release then covers what
    # the barrier ordered before it.
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel")
    return ticket == tl.num_programs(0) - 1


@triton.jit
def _collect(partials_ptr):  # type: ignore[no-untyped-def]
    """The sums of all programs together, float64; of no meaning in slots that none has left."""
    programs = tl.arange(0, _MAX_PROGRAMS)[:, None]
    offsets = programs * _NUM_SLOTS + _slots()[None, :]
    present = programs < tl.num_programs(0)
    return tl.sum(tl.load(partials_ptr + offsets, mask=present, other=0.0), axis=0)


_kept: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}


def scratch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(room for the sums, counter of tickets at 0) for the next launch on the current stream.

    They are kept for each stream, whose launches run one after another and leave the counter at 0:
    none meets another's numbers. A captured graph, though, may run on any stream, beside other
    work and beside other graphs. A launch under capture gets its own, and the graph sets the
    counter to 0 whenever it runs.
    """
    stream = 0
    if not INTERPRETING:
        if torch.cuda.is_current_stream_capturing():
            return _new(device)
        stream = torch.cuda.current_stream(device).cuda_stream
    found = _kept.get((device, stream))
    if found is None:
        found = _kept[device, stream] = _new(device)
    return found


def _new(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    partials = torch.empty(MAX_PROGRAMS, NUM_SLOTS, dtype=torch.float64, device=device)
    return partials, torch.zeros((), dtype=torch.int32, device=device)

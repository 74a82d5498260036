"""Masked moments and whitening on a GPU. Formulas: reference/rewards.py, masked_whiten_fwd.

Each program leaves (count, mean, sum of squared deviations) of its share in float64; whoever needs
the moments of all of them merges these few hundred parts itself. Which program adds what, and in
which order, depends on the number of entries alone, so two runs give equal bits.
"""

import torch

from fuserl_kernels.reference.rewards import WHITEN_EPSILON
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.triton_runtime import Configuration, tl, triton

MAX_PARTS = 512
_MERGE_BLOCK = tl.constexpr(512)
_EPSILON = tl.constexpr(WHITEN_EPSILON)


@triton.jit
def _absorb(count, mean, squares, x, mask):  # type: ignore[no-untyped-def]
    """The moments with those of a block's masked entries x, float64, merged into them."""
    block_count = tl.sum(mask.to(tl.float64))
    block_mean = tl.sum(tl.where(mask, x, 0.0)) / tl.maximum(block_count, 1.0)
    deviation = tl.where(mask, x - block_mean, 0.0)
    return _merge_two(count, mean, squares, block_count, block_mean, tl.sum(deviation * deviation))


@triton.jit
def _merge_two(count, mean, squares, more_count, more_mean, more_squares):  # type: ignore[no-untyped-def]
    total = count + more_count
    share = more_count / tl.maximum(total, 1.0)
    shift = more_mean - mean
    return total, mean + shift * share, squares + more_squares + shift * shift * count * share


@triton.jit
def _store_moments(moments_ptr, part, part_stride, item_stride, count, mean, squares):  # type: ignore[no-untyped-def]
    tl.store(moments_ptr + part * part_stride, count)
    tl.store(moments_ptr + part * part_stride + item_stride, mean)
    tl.store(moments_ptr + part * part_stride + 2 * item_stride, squares)


@triton.jit
def _merged(moments_ptr, num_parts, part_stride, item_stride):  # type: ignore[no-untyped-def]
    """Moments of num_parts disjoint sets -> those of all, merged block by block in their order."""
    zero = tl.full((), 0.0, tl.float64)
    count, mean, squares = zero, zero, zero
    lanes = tl.arange(0, _MERGE_BLOCK)
    for start in range(0, num_parts, _MERGE_BLOCK):
        part_ptr = moments_ptr + (start + lanes) * part_stride
        inside = start + lanes < num_parts
        counts = tl.load(part_ptr, mask=inside, other=0.0)
        means = tl.load(part_ptr + item_stride, mask=inside, other=0.0)
        part_squares = tl.load(part_ptr + 2 * item_stride, mask=inside, other=0.0)
        block_count = tl.sum(counts)
        block_mean = tl.sum(counts * means) / tl.maximum(block_count, 1.0)
        shifts = means - block_mean
        count, mean, squares = _merge_two(
            count, mean, squares,
            block_count, block_mean, tl.sum(part_squares + counts * shifts * shifts),
        )  # fmt: skip
    return count, mean, squares


@triton.jit
def _whitening_factor(count, squares, UNBIASED: tl.constexpr):  # type: ignore[no-untyped-def]
    degrees = count
    if UNBIASED:
        degrees = count - 1.0
    return tl.rsqrt(squares / tl.maximum(degrees, 1.0) + _EPSILON)


@triton.jit(do_not_specialize=["num_blocks"])
def _moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    mask_ptr,
    moments_ptr,
    num_entries,
    num_blocks,
    part_stride,
    item_stride,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    zero = tl.full((), 0.0, tl.float64)
    count, mean, squares = zero, zero, zero
    for block in range(part, num_blocks, tl.num_programs(0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        mask = tl.load(mask_ptr + offsets, mask=offsets < num_entries, other=0) != 0
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        count, mean, squares = _absorb(count, mean, squares, x, mask)
    _store_moments(moments_ptr, part, part_stride, item_stride, count, mean, squares)


@triton.jit
def _merge_kernel(parts_ptr, moments_ptr, num_parts, part_stride, item_stride):  # type: ignore[no-untyped-def]
    count, mean, squares = _merged(parts_ptr, num_parts, part_stride, item_stride)
    _store_moments(moments_ptr, 0, 0, 1, count, mean, squares)


@triton.jit(do_not_specialize=["num_parts"])
def _whiten_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    mask_ptr,
    moments_ptr,
    white_ptr,  # may be x_ptr
    num_entries,
    num_parts,
    part_stride,
    item_stride,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count, mean, squares = _merged(moments_ptr, num_parts, part_stride, item_stride)
    factor = _whitening_factor(count, squares, UNBIASED)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_entries
    mask = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
    white = (x - mean) * factor
    if not SHIFT_MEAN:
        white += mean
    white = tl.where(mask, white, 0.0).to(white_ptr.dtype.element_ty)
    tl.debug_barrier()  # every thread has loaded before any of it is overwritten
    tl.store(white_ptr + offsets, white, mask=inside)


MOMENTS_CONFIGURATION = Configuration(8, 1, {"BLOCK": 4096})
MERGE_CONFIGURATION = Configuration(4, 1)
WHITEN_CONFIGURATION = Configuration(4, 1, {"BLOCK": 1024})


def new_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for a contiguous result of the shape of x; a microsecond less than new_empty takes."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def parts_like(x: torch.Tensor, num_parts: int, num_items: int = 3) -> torch.Tensor:
    """Room for the parts of a reduction: float64 [num_parts, num_items], item by item in memory,
    so that whoever merges them reads neighbours."""
    return x.new_empty((num_items, num_parts), dtype=torch.float64).t()


def _moments_of_parts(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Moments [parts, 3] float64 of contiguous x [N] in at most MAX_PARTS parts."""
    num_blocks = -(-x.numel() // MOMENTS_CONFIGURATION.constants["BLOCK"])
    moments = parts_like(x, min(num_blocks, MAX_PARTS))
    if num_blocks:
        _moments_kernel[(moments.shape[0],)](
            x,
            mask,
            moments,
            x.numel(),
            num_blocks,
            *moments.stride(),
            **MOMENTS_CONFIGURATION.arguments(),
        )
    return moments


def masked_moments_triton(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """masked_moments_fwd of the reference: one launch, or two past one block of entries."""
    parts = _moments_of_parts(x.contiguous(), mask.contiguous())
    if parts.shape[0] == 1:
        return parts.reshape(3)
    moments = x.new_empty(3, dtype=torch.float64)
    _merge_kernel[(1,)](
        parts, moments, parts.shape[0], *parts.stride(), **MERGE_CONFIGURATION.arguments()
    )
    return moments


def whiten_with(
    x: torch.Tensor,
    mask: torch.Tensor,
    moments: torch.Tensor,  # [W, 3] float64
    shift_mean: bool,
    unbiased: bool,
    out: torch.Tensor,
) -> None:
    """Whitens contiguous x into `out`, which may be x, by the merged moments."""
    num_entries, block = x.numel(), WHITEN_CONFIGURATION.constants["BLOCK"]
    if num_entries:
        _whiten_kernel[(-(-num_entries // block),)](
            x,
            mask,
            moments,
            out,
            num_entries,
            moments.shape[0],
            *moments.stride(),
            shift_mean,
            unbiased,
            **WHITEN_CONFIGURATION.arguments(),
        )


def masked_whiten_triton(
    x: torch.Tensor,
    mask: torch.Tensor,
    moments: torch.Tensor | None,
    shift_mean: bool,
    unbiased: bool,
) -> torch.Tensor:
    """masked_whiten_fwd of the reference: one launch, and one more for the moments of x."""
    x, mask = x.contiguous(), mask.contiguous()
    if moments is None:
        moments = _moments_of_parts(x, mask)
    white = new_like(x, compute_dtype(x))
    whiten_with(x, mask, moments, shift_mean, unbiased, white)
    return white

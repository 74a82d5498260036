"""RMSNorm and LayerNorm on a GPU, and their gradients. Formulas: reference/norms.py.

Up to MAX_WHOLE columns forward and MAX_WHOLE_BWD backward a program holds whole rows in registers,
so each is read once; short rows (the heads of a layer) go many to a program. Wider rows are walked
again, out of the cache. A program's shape depends on the width alone, so a row has the same bits
whatever stands beside it. The backward pass has at most MAX_PARTS programs, each with every so
many-th tile of rows; what they sum for weight and bias a second launch adds in the order of
programs: a fixed order, on any device.
"""

import functools

import torch

from fuserl_kernels.row_layout import RowLayout, readable_vector, row_layout
from fuserl_kernels.triton_helpers import _cast
from fuserl_kernels.triton_runtime import Configuration, tl, triton

MAX_WHOLE = 16384  # columns: 32 floats a thread of 16 warps
MAX_WHOLE_BWD = 8192  # the sums of weight and bias take room too
MAX_PARTS = 256  # two for each multiprocessor of a large GPU
_WALK_BLOCK = 4096


@triton.jit
def _row_start(rows, inner_rows, outer_stride, inner_stride):  # type: ignore[no-untyped-def]
    """Offsets of rows, int64; inner_rows is None where one stride serves all."""
    if inner_rows is None:
        starts = rows * inner_stride
    else:
        starts = rows // inner_rows * outer_stride + rows % inner_rows * inner_stride
    return starts


@triton.jit
def _rstd(squares, hidden_size, eps):  # type: ignore[no-untyped-def]
    return tl.div_rn(1.0, tl.sqrt_rn(squares / hidden_size + eps))


@triton.jit
def _scale(weight_ptr, cols, inside, weight_offset):  # type: ignore[no-untyped-def]
    return tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32) + weight_offset


@triton.jit(do_not_specialize=["num_rows"])
def _fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,  # or None, with summed_ptr
    weight_ptr,
    bias_ptr,  # or None
    y_ptr,
    summed_ptr,
    stats_ptr,
    num_rows,
    hidden_size,
    inner_rows,
    outer_stride,
    inner_stride,
    eps,
    weight_offset,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    is_row, is_col = rows < num_rows, cols < hidden_size
    inside = is_row[:, None] & is_col[None, :]
    starts = _row_start(rows, inner_rows, outer_stride, inner_stride)
    offsets = rows[:, None] * hidden_size + cols[None, :]
    x = tl.load(x_ptr + starts[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        summed = _cast(x, summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offsets, summed, mask=inside)
        x = summed.to(tl.float32)
    if CENTERED:
        mean = tl.sum(x, axis=1) / hidden_size
        x = tl.where(inside, x - mean[:, None], 0.0)
        tl.store(stats_ptr + num_rows + rows, mean, mask=is_row)
    rstd = _rstd(tl.sum(x * x, axis=1), hidden_size, eps)
    tl.store(stats_ptr + rows, rstd, mask=is_row)
    y = x * rstd[:, None] * _scale(weight_ptr, cols, is_col, weight_offset)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, _cast(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _fwd_walk_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,  # or None, with summed_ptr
    weight_ptr,
    bias_ptr,  # or None
    y_ptr,
    summed_ptr,
    stats_ptr,
    num_rows,
    hidden_size,
    inner_rows,
    outer_stride,
    inner_stride,
    eps,
    weight_offset,
    CENTERED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row, in blocks."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D)
    row_ptr = x_ptr + _row_start(row, inner_rows, outer_stride, inner_stride)
    y_ptr += row * hidden_size
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        cols = start + lanes
        inside = cols < hidden_size
        x = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            offsets = row * hidden_size + cols
            x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            summed = _cast(x, summed_ptr.dtype.element_ty)
            tl.store(summed_ptr + offsets, summed, mask=inside)
            x = summed.to(tl.float32)
        if CENTERED:
            sums += x
        else:
            sums += x * x
    if residual_ptr is not None:
        row_ptr = summed_ptr + row * hidden_size
        tl.debug_barrier()  # the walks below may read what another thread has stored
    total, mean = tl.sum(sums), 0.0
    if CENTERED:
        mean = total / hidden_size
        tl.store(stats_ptr + num_rows + row, mean)
        sums = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, hidden_size, BLOCK_D):
            cols = start + lanes
            inside = cols < hidden_size
            x = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            x = tl.where(inside, x - mean, 0.0)
            sums += x * x
        total = tl.sum(sums)
    rstd = _rstd(total, hidden_size, eps)
    tl.store(stats_ptr + row, rstd)
    for start in range(0, hidden_size, BLOCK_D):
        cols = start + lanes
        inside = cols < hidden_size
        x = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32) - mean
        y = x * rstd * _scale(weight_ptr, cols, inside, weight_offset)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + cols, _cast(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _bwd_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    weight_ptr,
    stats_ptr,
    grad_y_ptr,
    grad_summed_ptr,  # or None
    grad_x_ptr,
    parts_ptr,  # or None: sums of weight and bias by program
    num_rows,
    hidden_size,
    inner_rows,
    outer_stride,
    inner_stride,
    weight_offset,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_D)
    is_col = cols < hidden_size
    scale = _scale(weight_ptr, cols, is_col, weight_offset)
    weight_sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    bias_sums = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        is_row = rows < num_rows
        inside = is_row[:, None] & is_col[None, :]
        starts = _row_start(rows, inner_rows, outer_stride, inner_stride)
        offsets = rows[:, None] * hidden_size + cols[None, :]
        n = tl.load(rows_ptr + starts[:, None] + cols[None, :], mask=inside, other=0.0)
        g = tl.load(grad_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(stats_ptr + rows, mask=is_row, other=0.0)
        n = n.to(tl.float32)
        if CENTERED:
            n -= tl.load(stats_ptr + num_rows + rows, mask=is_row, other=0.0)[:, None]
        n *= rstd[:, None]
        v = g * scale[None, :]
        slope = tl.sum(v * n, axis=1) / hidden_size
        out = v - n * slope[:, None]
        if CENTERED:
            out -= (tl.sum(v, axis=1) / hidden_size)[:, None]
        out *= rstd[:, None]
        if grad_summed_ptr is not None:
            out += tl.load(grad_summed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offsets, _cast(out, grad_x_ptr.dtype.element_ty), mask=inside)
        if parts_ptr is not None:
            weight_sums += g * n
            if CENTERED:
                bias_sums += g
    if parts_ptr is not None:
        part_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * hidden_size + cols
        tl.store(part_ptr, tl.sum(weight_sums, axis=0), mask=is_col)
        if CENTERED:
            part_ptr += tl.num_programs(0).to(tl.int64) * hidden_size
            tl.store(part_ptr, tl.sum(bias_sums, axis=0), mask=is_col)


@triton.jit(do_not_specialize=["num_rows"])
def _bwd_walk_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    weight_ptr,
    stats_ptr,
    grad_y_ptr,
    grad_summed_ptr,  # or None
    grad_x_ptr,
    parts_ptr,  # or None: sums of weight and bias by program, zeros at first
    num_rows,
    hidden_size,
    inner_rows,
    outer_stride,
    inner_stride,
    weight_offset,
    CENTERED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As _bwd_kernel, a row at a time in blocks; the sums stay in the program's part."""
    lanes = tl.arange(0, BLOCK_D)
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for row in range(program, num_rows, num_programs):
        row_ptr = rows_ptr + _row_start(row, inner_rows, outer_stride, inner_stride)
        rstd, mean = tl.load(stats_ptr + row), 0.0
        if CENTERED:
            mean = tl.load(stats_ptr + num_rows + row)
        products = tl.zeros((BLOCK_D,), tl.float32)
        plain = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, hidden_size, BLOCK_D):
            cols = start + lanes
            inside = cols < hidden_size
            offsets = row * hidden_size + cols
            g = tl.load(grad_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            v = g * _scale(weight_ptr, cols, inside, weight_offset)
            products += v * ((n - mean) * rstd)
            if CENTERED:
                plain += v
        slope, level = tl.sum(products) / hidden_size, 0.0
        if CENTERED:
            level = tl.sum(plain) / hidden_size
        for start in range(0, hidden_size, BLOCK_D):
            cols = start + lanes
            inside = cols < hidden_size
            offsets = row * hidden_size + cols
            g = tl.load(grad_y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            n = tl.load(row_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            n = (n - mean) * rstd
            out = (g * _scale(weight_ptr, cols, inside, weight_offset) - n * slope - level) * rstd
            if grad_summed_ptr is not None:
                out += tl.load(grad_summed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + offsets, _cast(out, grad_x_ptr.dtype.element_ty), mask=inside)
            if parts_ptr is not None:
                part_ptr = parts_ptr + program * hidden_size + cols
                sums = tl.load(part_ptr, mask=inside, other=0.0)
                tl.store(part_ptr, sums + g * n, mask=inside)
                if CENTERED:
                    part_ptr += num_programs * hidden_size
                    sums = tl.load(part_ptr, mask=inside, other=0.0)
                    tl.store(part_ptr, sums + g, mask=inside)
        tl.debug_barrier()  # the next row may add to what another thread has stored


@triton.jit(do_not_specialize=["num_parts"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    out_ptr,
    num_parts,
    hidden_size,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over the parts [num_parts, D] of one vector's gradient, in their order."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < hidden_size
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, num_parts, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        present = (parts < num_parts)[:, None] & inside[None, :]
        offsets = parts.to(tl.int64)[:, None] * hidden_size + cols[None, :]
        sums += tl.load(parts_ptr + offsets, mask=present, other=0.0)
    total = tl.sum(sums, axis=0)
    tl.store(out_ptr + cols, _cast(total, out_ptr.dtype.element_ty), mask=inside)


MERGE_CONFIGURATION = Configuration(4, 1, {"BLOCK_P": 32, "BLOCK_D": 32})
WALK_CONFIGURATION = Configuration(8, 1, {"BLOCK_D": _WALK_BLOCK})


@functools.cache
def whole_configuration(hidden_size: int, tile: int) -> Configuration:
    """For rows held whole: as many as make a tile of so many elements, up to 32."""
    block = triton.next_power_of_2(hidden_size)
    rows = min(32, max(1, tile // block))
    num_warps = min(16, max(4, rows * block // 512))
    return Configuration(num_warps, 1, {"ROWS": rows, "BLOCK_D": block})


def fwd_configuration(hidden_size: int) -> Configuration:
    return whole_configuration(hidden_size, 2048)


def bwd_configuration(hidden_size: int) -> Configuration:
    """Larger tiles: few programs must keep the memory busy."""
    return whole_configuration(hidden_size, 4096)


def _strides(layout: RowLayout) -> tuple[int | None, int, int]:
    """inner_rows, None where it is not needed, and the strides of rows."""
    if layout.is_plain:
        return None, 0, layout.inner_stride
    return layout.inner_rows, layout.outer_stride, layout.inner_stride


def forward_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, layout = row_layout(x)
    hidden_size = x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is None:
        summed = x.new_empty(0)
    else:
        residual, summed = residual.contiguous(), torch.empty_like(y)
    stats = x.new_empty((2 if centered else 1, *x.shape[:-1]), dtype=torch.float32)
    if layout.num_rows == 0:
        return y, summed, stats
    kernel, configuration, num_programs = _fwd_walk_kernel, WALK_CONFIGURATION, layout.num_rows
    if hidden_size <= MAX_WHOLE:
        kernel, configuration = _fwd_kernel, fwd_configuration(hidden_size)
        num_programs = -(-layout.num_rows // configuration.constants["ROWS"])
    kernel[(num_programs,)](
        x,
        residual,
        readable_vector(weight),
        None if bias is None else readable_vector(bias),
        y,
        summed,
        stats,
        layout.num_rows,
        hidden_size,
        *_strides(layout),
        eps,
        weight_offset,
        centered,
        **configuration.arguments(),
    )
    return y, summed, stats


def backward_triton(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    grad_y: torch.Tensor,
    grad_summed: torch.Tensor | None,
    weight_offset: float,
    weight_grad: bool,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, layout = row_layout(rows)
    hidden_size = rows.shape[-1]
    grad_x = torch.empty_like(rows, memory_format=torch.contiguous_format)
    kernel, configuration, num_tiles = _bwd_walk_kernel, WALK_CONFIGURATION, layout.num_rows
    if hidden_size <= MAX_WHOLE_BWD:
        kernel, configuration = _bwd_kernel, bwd_configuration(hidden_size)
        num_tiles = -(-layout.num_rows // configuration.constants["ROWS"])
    num_parts = min(MAX_PARTS, num_tiles) if weight_grad else num_tiles
    parts = None
    if weight_grad:
        size = (2 if centered else 1, num_parts, hidden_size)
        new = rows.new_empty if hidden_size <= MAX_WHOLE_BWD else rows.new_zeros
        parts = new(size, dtype=torch.float32)
    if num_parts:
        kernel[(num_parts,)](
            rows,
            readable_vector(weight),
            stats.contiguous(),
            grad_y.contiguous(),
            None if grad_summed is None else grad_summed.contiguous(),
            grad_x,
            parts,
            layout.num_rows,
            hidden_size,
            *_strides(layout),
            weight_offset,
            centered,
            **configuration.arguments(),
        )
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if parts is not None:
        grad_weight = _merged(parts[0], weight)
        if bias is not None:
            grad_bias = _merged(parts[1], bias)
    return grad_x, grad_weight, grad_bias


def _merged(parts: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """The sum of parts [P, D], in the dtype of the vector whose gradient it is."""
    num_parts, hidden_size = parts.shape
    out = torch.empty_like(readable_vector(vector))
    block = MERGE_CONFIGURATION.constants["BLOCK_D"]
    _merge_kernel[(-(-hidden_size // block),)](
        parts, out, num_parts, hidden_size, **MERGE_CONFIGURATION.arguments()
    )
    return out.to(vector.dtype)

"""rotary and rotary_kv_write on a GPU. Formulas: reference/rotary.py.

A program does a block of heads of one kind (query, key or value) of one token. An element and its
partner in the rotation are loaded apart: the second load hits the cache, and any head_dim and
rotary_dim work. A position outside the tables turns its heads to NaN, and a key or value whose slot
or offset is outside the caches goes nowhere: the device is never asked before a launch.
"""

import functools
from typing import Any

import torch

from fuserl_kernels.native_rotary import readable_weight, unit_stride, weight_gradients
from fuserl_kernels.reference.rotary import head_dim_of
from fuserl_kernels.triton_helpers import _cast
from fuserl_kernels.triton_runtime import Configuration, tl, triton


@triton.jit
def _partners(cols, rotary_dim, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each of the first rotary_dim columns: the other one of its pair, the pair's number, and
    the sign of the sine in its turn."""
    if INTERLEAVED:
        is_first = cols % 2 == 0
        partners = cols ^ 1
        pairs = cols // 2
    else:
        half = rotary_dim // 2
        is_first = cols < half
        partners = tl.where(is_first, cols + half, cols - half)
        pairs = tl.where(is_first, cols, cols - half)
    return partners, pairs, tl.where(is_first, -1.0, 1.0)


@triton.jit
def _angles(  # type: ignore[no-untyped-def]
    cos_ptr, sin_ptr, cos_stride, sin_stride, position, num_positions, pairs, cols, rotary_dim
):
    """cos and sin [1, cols] of a token: those of its position; NaN outside the tables."""
    in_tables = (position >= 0) & (position < num_positions)
    known = cols < tl.where(in_tables, rotary_dim, 0)
    cos = tl.load(cos_ptr + position * cos_stride + pairs, mask=known, other=float("nan"))
    sin = tl.load(sin_ptr + position * sin_stride + pairs, mask=known, other=float("nan"))
    return cos, sin


@triton.jit
def _turned_heads(  # type: ignore[no-untyped-def]
    source_ptr,  # of the token's heads of this kind
    target_ptr,
    target_head_stride,
    weight_ptr,  # or None
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    position,
    num_positions,
    first_head,
    num_heads,
    head_dim,
    rotary_dim,
    eps,
    weight_offset,
    INTERLEAVED: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    heads = (first_head + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < num_heads) & (cols < head_dim)
    head_ptr = source_ptr + heads * head_dim
    y = tl.load(head_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    if weight_ptr is not None:
        scale = 1.0 / tl.sqrt(tl.sum(y * y, axis=1) / head_dim + eps)[:, None]
        weight = tl.load(weight_ptr + cols, mask=cols < head_dim, other=0.0).to(tl.float32)
        y = y * scale * (weight_offset + weight)
    if TURNS:
        partners, pairs, sign = _partners(cols, rotary_dim, INTERLEAVED)
        turns = cols < rotary_dim
        cos, sin = _angles(
            cos_ptr, sin_ptr, cos_stride, sin_stride, position, num_positions, pairs, cols,
            rotary_dim,
        )  # fmt: skip
        both = inside & turns
        other = tl.load(head_ptr + partners, mask=both, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + partners, mask=turns, other=0.0).to(tl.float32)
            other = other * scale * (weight_offset + weight)
        y = tl.where(turns, y * cos + sign * (other * sin), y)
    target_ptr += heads * target_head_stride + cols
    tl.store(target_ptr, _cast(y, target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _copied_heads(  # type: ignore[no-untyped-def]
    source_ptr,
    source_head_stride,
    target_ptr,
    target_head_stride,
    first_head,
    num_heads,
    head_dim,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    heads = (first_head + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < num_heads) & (cols < head_dim)
    x = tl.load(source_ptr + heads * source_head_stride + cols, mask=inside)
    tl.store(target_ptr + heads * target_head_stride + cols, x, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "num_slots", "num_offsets"])
def _rotary_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_weight_ptr,  # or None
    k_weight_ptr,  # or None
    query_ptr,
    key_ptr,
    value_ptr,
    slots_ptr,  # or None: token n's key and value go to row n
    offsets_ptr,  # or None
    num_tokens,
    num_positions,
    num_slots,
    num_offsets,
    num_heads,
    num_kv_heads,
    head_dim,
    rotary_dim,
    qkv_stride,
    cos_stride,
    sin_stride,
    key_row_stride,
    key_head_stride,
    key_offset_stride,
    value_row_stride,
    value_head_stride,
    value_offset_stride,
    eps,
    weight_offset,
    INTERLEAVED: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts, kv_parts = tl.cdiv(num_heads, BLOCK_H), tl.cdiv(num_kv_heads, BLOCK_H)
    row_ptr = qkv_ptr + token * qkv_stride
    position = tl.load(positions_ptr + token)
    if part < q_parts:
        _turned_heads(
            row_ptr, query_ptr + token * num_heads * head_dim, head_dim, q_weight_ptr,
            cos_ptr, sin_ptr, cos_stride, sin_stride, position, num_positions,
            part * BLOCK_H, num_heads, head_dim, rotary_dim, eps, weight_offset,
            INTERLEAVED, TURNS, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        row, offset = token, token * 0
        written = token >= 0
        if slots_ptr is not None:
            row, offset = tl.load(slots_ptr + token), tl.load(offsets_ptr + token)
            written = (row >= 0) & (row < num_slots) & (offset >= 0) & (offset < num_offsets)
        if written:
            part -= q_parts
            row_ptr += num_heads * head_dim
            if part < kv_parts:
                _turned_heads(
                    row_ptr, key_ptr + row * key_row_stride + offset * key_offset_stride,
                    key_head_stride, k_weight_ptr,
                    cos_ptr, sin_ptr, cos_stride, sin_stride, position, num_positions,
                    part * BLOCK_H, num_kv_heads, head_dim, rotary_dim, eps, weight_offset,
                    INTERLEAVED, TURNS, BLOCK_H, BLOCK_D,
                )  # fmt: skip
            else:
                _copied_heads(
                    row_ptr + num_kv_heads * head_dim, head_dim,
                    value_ptr + row * value_row_stride + offset * value_offset_stride,
                    value_head_stride, (part - kv_parts) * BLOCK_H, num_kv_heads, head_dim,
                    BLOCK_H, BLOCK_D,
                )  # fmt: skip


@triton.jit
def _turned_back(  # type: ignore[no-untyped-def]
    grad_ptr,  # of this kind of heads, or None for zero
    grad_token_stride,
    grad_head_stride,
    source_ptr,  # their place in qkv, or None without a norm
    qkv_stride,
    target_ptr,  # their place in the gradient of qkv
    target_stride,
    weight_ptr,  # or None
    cos_ptr,
    sin_ptr,
    cos_stride,
    sin_stride,
    positions_ptr,
    num_positions,
    first_token,
    last_token,
    first_head,
    num_heads,
    head_dim,
    rotary_dim,
    eps,
    weight_offset,
    INTERLEAVED: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores the gradient of a block of heads of some tokens; returns [BLOCK_D], their share of the
    gradient of the norm's weight."""
    heads = (first_head + tl.arange(0, BLOCK_H))[:, None].to(tl.int64)
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < num_heads) & (cols < head_dim)
    partners, pairs, sign = _partners(cols, rotary_dim, INTERLEAVED)
    turns = cols < rotary_dim
    sums = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for token in range(first_token, last_token):
        g = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        if grad_ptr is not None:
            head_ptr = grad_ptr + token * grad_token_stride + heads * grad_head_stride
            g = tl.load(head_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            if TURNS:
                cos, sin = _angles(
                    cos_ptr, sin_ptr, cos_stride, sin_stride, tl.load(positions_ptr + token),
                    num_positions, pairs, cols, rotary_dim,
                )  # fmt: skip
                other = tl.load(head_ptr + partners, mask=inside & turns, other=0.0)
                g = tl.where(turns, g * cos - sign * (other.to(tl.float32) * sin), g)
            if weight_ptr is not None:
                x_ptr = source_ptr + token * qkv_stride + heads * head_dim + cols
                n = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
                scale = 1.0 / tl.sqrt(tl.sum(n * n, axis=1) / head_dim + eps)[:, None]
                n = n * scale
                sums += g * n
                weight = tl.load(weight_ptr + cols, mask=cols < head_dim, other=0.0)
                g = g * (weight_offset + weight.to(tl.float32))
                g = scale * (g - n * (tl.sum(g * n, axis=1) / head_dim)[:, None])
        to_ptr = target_ptr + token * target_stride + heads * head_dim + cols
        tl.store(to_ptr, _cast(g, to_ptr.dtype.element_ty), mask=inside)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "part_tokens"])
def _rotary_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_query_ptr,  # or None for zero, as the next two
    grad_key_ptr,
    grad_value_ptr,
    qkv_ptr,  # or None without a norm
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_weight_ptr,  # or None
    k_weight_ptr,  # or None
    grad_qkv_ptr,
    partials_ptr,  # [num_programs(0), q_parts + kv_parts, head_dim], or None without a norm
    num_tokens,
    num_positions,
    part_tokens,  # of a program
    num_heads,
    num_kv_heads,
    head_dim,
    rotary_dim,
    qkv_stride,
    cos_stride,
    sin_stride,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    eps,
    weight_offset,
    INTERLEAVED: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts, kv_parts = tl.cdiv(num_heads, BLOCK_H), tl.cdiv(num_kv_heads, BLOCK_H)
    row_size = (num_heads + 2 * num_kv_heads) * head_dim
    key_start = num_heads * head_dim
    first = program * part_tokens
    last = tl.minimum(first + part_tokens, num_tokens)
    key_qkv_ptr = qkv_ptr
    if qkv_ptr is not None:
        key_qkv_ptr = qkv_ptr + key_start
    if part < q_parts:
        sums = _turned_back(
            grad_query_ptr, query_token_stride, query_head_stride, qkv_ptr, qkv_stride,
            grad_qkv_ptr, row_size, q_weight_ptr, cos_ptr, sin_ptr, cos_stride, sin_stride,
            positions_ptr, num_positions, first, last, part * BLOCK_H, num_heads, head_dim,
            rotary_dim, eps, weight_offset, INTERLEAVED, TURNS, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    elif part < q_parts + kv_parts:
        sums = _turned_back(
            grad_key_ptr, key_token_stride, key_head_stride, key_qkv_ptr, qkv_stride,
            grad_qkv_ptr + key_start, row_size, k_weight_ptr, cos_ptr, sin_ptr, cos_stride,
            sin_stride, positions_ptr, num_positions, first, last, (part - q_parts) * BLOCK_H,
            num_kv_heads, head_dim, rotary_dim, eps, weight_offset, INTERLEAVED, TURNS, BLOCK_H,
            BLOCK_D,
        )  # fmt: skip
    else:
        sums = _turned_back(
            grad_value_ptr, value_token_stride, value_head_stride, None, qkv_stride,
            grad_qkv_ptr + key_start + num_kv_heads * head_dim, row_size, None, cos_ptr, sin_ptr,
            cos_stride, sin_stride, positions_ptr, num_positions, first, last,
            (part - q_parts - kv_parts) * BLOCK_H, num_kv_heads, head_dim, rotary_dim, eps,
            weight_offset, INTERLEAVED, False, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    if partials_ptr is not None:  # noqa: SIM102 - known to the compiler, where `and` is not
        if part < q_parts + kv_parts:
            cols = tl.arange(0, BLOCK_D)
            partials_ptr += (program * (q_parts + kv_parts) + part) * head_dim
            tl.store(partials_ptr + cols, sums, mask=cols < head_dim)


@triton.jit(do_not_specialize=["num_programs"])
def _weights_kernel(  # type: ignore[no-untyped-def]
    partials_ptr,  # [num_programs, q_parts + kv_parts, head_dim]
    grad_weights_ptr,  # [2, head_dim]
    num_programs,
    q_parts,
    kv_parts,
    head_dim,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the query's parts where program_id(0) is 0 and of the key's where it is 1, block by
    block in their order."""
    kind = tl.program_id(0)
    first = tl.where(kind == 0, 0, q_parts)
    num_parts = tl.where(kind == 0, q_parts, kv_parts)
    num_rows = num_programs * num_parts
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        places = rows // num_parts * (q_parts + kv_parts) + first + rows % num_parts
        inside = (rows < num_rows)[:, None] & (cols < head_dim)[None, :]
        offsets = places[:, None] * head_dim + cols[None, :]
        sums += tl.sum(tl.load(partials_ptr + offsets, mask=inside, other=0.0), axis=0)
    tl.store(grad_weights_ptr + kind * head_dim + cols, sums, mask=cols < head_dim)


WEIGHTS_CONFIGURATION = Configuration(4, 1, {"BLOCK_ROWS": 128, "BLOCK_D": 32})
NUM_WARPS = 4
BLOCK_ELEMENTS = 2048  # of a program's tile
BLOCK_ELEMENTS_BWD = 1024
MAX_PROGRAMS = 256  # that share the tokens where a norm's gradient is summed


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


@functools.cache
def configuration(
    head_dim: int, num_heads: int, block_elements: int = BLOCK_ELEMENTS
) -> Configuration:
    """One for a model, whatever the number of tokens: the norm's sum depends on the tile."""
    block_d = _power_of_two(head_dim)
    block_h = min(_power_of_two(num_heads), max(1, block_elements // block_d))
    return Configuration(NUM_WARPS, 1, {"BLOCK_H": block_h, "BLOCK_D": block_d})


def _num_parts(num_heads: int, num_kv_heads: int, block_h: int) -> tuple[int, int]:
    """Blocks of query heads, and of key or of value heads."""
    return -(-num_heads // block_h), -(-num_kv_heads // block_h)


def _forward(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    options: tuple,  # from num_heads on those of rotary_fwd
    key: torch.Tensor,
    key_strides: tuple[int, ...],  # of tokens or slots, of heads, of a slot's tokens
    value: torch.Tensor,
    value_strides: tuple[int, ...],
    slots: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fills key and value; returns the query."""
    num_heads, num_kv_heads, interleaved, q_norm_weight, k_norm_weight, eps, offset = options
    num_tokens, head_dim = qkv.shape[0], head_dim_of(qkv, num_heads, num_kv_heads)
    query = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens == 0:
        return query
    qkv, cos, sin = unit_stride(qkv), unit_stride(cos), unit_stride(sin)
    chosen = configuration(head_dim, num_heads)
    q_parts, kv_parts = _num_parts(num_heads, num_kv_heads, chosen.constants["BLOCK_H"])
    _rotary_kernel[(num_tokens, q_parts + 2 * kv_parts)](
        qkv,
        cos,
        sin,
        positions.contiguous(),
        readable_weight(q_norm_weight),
        readable_weight(k_norm_weight),
        query,
        key,
        value,
        slots,
        offsets,
        num_tokens,
        cos.shape[0],
        0 if slots is None else key.shape[0],
        0 if slots is None else key.shape[2],
        num_heads,
        num_kv_heads,
        head_dim,
        2 * cos.shape[1],
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        *key_strides[:3],
        *value_strides[:3],
        eps,
        offset,
        interleaved,
        cos.shape[1] > 0,
        **chosen.arguments(),
    )
    return query


def forward_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rotary_fwd of the reference: one launch."""
    head_dim = head_dim_of(qkv, num_heads, num_kv_heads)
    key = qkv.new_empty(qkv.shape[0], num_kv_heads, head_dim)
    value = qkv.new_empty(qkv.shape[0], num_kv_heads, head_dim)
    strides = (num_kv_heads * head_dim, head_dim, 0)
    all_options = (num_heads, num_kv_heads, *options)
    query = _forward(qkv, cos, sin, positions, all_options, key, strides, value, strides)
    return query, key, value


def kv_write_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    *options: Any,
) -> torch.Tensor:
    """rotary_kv_write_fwd of the reference: one launch."""
    slots, offsets = slots.contiguous(), offsets.contiguous()
    caches = (key_cache, key_cache.stride(), value_cache, value_cache.stride())
    return _forward(qkv, cos, sin, positions, options, *caches, slots, offsets)


def backward_triton(
    like: torch.Tensor,
    grad_query: torch.Tensor | None,
    grad_key: torch.Tensor | None,
    grad_value: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    qkv: torch.Tensor | None,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rotary_bwd of the reference: one launch, and a small one to sum the gradients of the norms'
    weights. Who sums what depends on the number of tokens alone."""
    num_tokens = positions.shape[0]
    grad_qkv = like.new_empty(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    chosen = configuration(head_dim, num_heads, BLOCK_ELEMENTS_BWD)
    q_parts, kv_parts = _num_parts(num_heads, num_kv_heads, chosen.constants["BLOCK_H"])
    part_tokens = 1 if qkv is None else max(1, -(-num_tokens // MAX_PROGRAMS))
    num_programs = -(-num_tokens // part_tokens)
    partials = grad_weights = None
    if qkv is not None:
        qkv = unit_stride(qkv)
        partials = like.new_empty(num_programs, q_parts + kv_parts, head_dim, dtype=torch.float32)
        grad_weights = like.new_empty(2, head_dim, dtype=torch.float32)
    gradients = [
        None if grad is None else unit_stride(grad) for grad in (grad_query, grad_key, grad_value)
    ]
    strides = [(0, 0) if grad is None else grad.stride()[:2] for grad in gradients]
    cos, sin = unit_stride(cos), unit_stride(sin)
    if num_tokens:
        _rotary_bwd_kernel[(num_programs, q_parts + 2 * kv_parts)](
            *gradients,
            qkv,
            cos,
            sin,
            positions.contiguous(),
            readable_weight(q_norm_weight),
            readable_weight(k_norm_weight),
            grad_qkv,
            partials,
            num_tokens,
            cos.shape[0],
            part_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            2 * cos.shape[1],
            0 if qkv is None else qkv.stride(0),
            cos.stride(0),
            sin.stride(0),
            *strides[0],
            *strides[1],
            *strides[2],
            eps,
            weight_offset,
            interleaved,
            cos.shape[1] > 0,
            **chosen.arguments(),
        )
    if partials is not None:
        _weights_kernel[(2, -(-head_dim // WEIGHTS_CONFIGURATION.constants["BLOCK_D"]))](
            partials,
            grad_weights,
            num_programs,
            q_parts,
            kv_parts,
            head_dim,
            **WEIGHTS_CONFIGURATION.arguments(),
        )
    return grad_qkv, *weight_gradients(like, grad_weights, q_norm_weight, k_norm_weight)

"""Log-probabilities straight from hidden states, for old and reference policies: no gradient.

    logits = softcap * tanh((hidden @ weight.T + bias) / softcap)        never stored
    logprobs, entropy, stats = those of token_logprobs on logits

A persistent grid walks tiles of BLOCK_N rows x BLOCK_V tokens. The fp32 accumulator of a tile takes
bias and cap and shrinks to three numbers a row: (max, sum 2^d, sum d 2^d) with d as in
triton_helpers.py; the tile that holds a row's token stores its logit. A second, small kernel merges
the tiles of a row in a fixed order. 2 N D V operations; memory beyond the results: 12 bytes a row
and tile, 49 MB at N = 8192 and V = 128256.

Tiles of VOCAB_GROUP columns of tiles go together through all rows, so that weights are read from
device memory once and hidden states V / (BLOCK_V VOCAB_GROUP) times.

A row's bits depend on the row, the weights and the configuration, and the configuration follows
from device, dtype, alignment and softcap, never from a measurement or the number of rows.
"""

import importlib

import torch

from fuserl_kernels.triton_helpers import LOG2E, MIN_EXPONENT, _cap, _merge, _merge_all
from fuserl_kernels.triton_runtime import (
    INTERPRETING,
    Configuration,
    num_processors,
    tl,
    triton,
)

PARTS = tl.constexpr(64)  # tiles merged side by side
PART_DOUBLINGS = tl.constexpr(6)
UPCAST = tl.constexpr(INTERPRETING)  # the interpreter would multiply the bit patterns of bf16


@triton.jit
def _tile(index, num_row_tiles, num_vocab_tiles, VOCAB_GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """(row tile, vocabulary tile) of the index-th tile in order of work."""
    group = index // (VOCAB_GROUP * num_row_tiles)
    first = group * VOCAB_GROUP
    width = tl.minimum(num_vocab_tiles - first, VOCAB_GROUP)
    within = index - first * num_row_tiles
    return within // width, first + within % width


@triton.jit
def _store_parts(  # type: ignore[no-untyped-def]
    logits,  # [BLOCK_N, BLOCK_V] fp32, before bias and cap
    rows,
    col_start,
    bias_ptr,  # or None
    token_ids_ptr,
    temperatures_ptr,  # or None
    token_logits_ptr,
    parts_ptr,
    vocab_tile,
    num_vocab_tiles,
    num_rows,
    vocab_size,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    cols = col_start + tl.arange(0, logits.shape[1])
    real, inside = rows < num_rows, cols < vocab_size
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    x = _cap(logits, softcap, SOFTCAP)
    x = tl.where(inside[None, :], x, -float("inf"))
    token_cols = tl.load(token_ids_ptr + rows, mask=real, other=-1) - col_start
    here = (token_cols >= 0) & (token_cols < tl.minimum(cols.shape[0], vocab_size - col_start))
    is_token = tl.arange(0, cols.shape[0])[None, :] == token_cols.to(tl.int32)[:, None]
    token_logits = tl.sum(tl.where(is_token, x, 0.0), axis=1)
    tl.store(token_logits_ptr + rows, token_logits, mask=here & real)
    scale = LOG2E / temperature
    if temperatures_ptr is not None:
        scale = LOG2E / tl.load(temperatures_ptr + rows, mask=real, other=1.0)[:, None]
    tile_max = tl.max(x, axis=1)
    d = (x - tl.where(tile_max == -float("inf"), 0.0, tile_max)[:, None]) * scale
    e = tl.exp2(d)
    part_ptr = parts_ptr + vocab_tile.to(tl.int64) * num_rows + rows
    part_stride = num_vocab_tiles.to(tl.int64) * num_rows
    tl.store(part_ptr, tile_max, mask=real)
    tl.store(part_ptr + part_stride, tl.sum(e, axis=1), mask=real)
    if ENTROPY:
        dot = tl.sum(e * tl.maximum(d, MIN_EXPONENT), axis=1)
        tl.store(part_ptr + 2 * part_stride, dot, mask=real)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(  # type: ignore[no-untyped-def]
    hidden,  # [N, D]: a TMA descriptor of BLOCK_N x BLOCK_D, or a pointer
    weight,  # [V, D]: a TMA descriptor of BLOCK_V x BLOCK_D, or a pointer
    bias_ptr,
    token_ids_ptr,
    temperatures_ptr,
    token_logits_ptr,
    parts_ptr,
    num_rows,
    vocab_size,
    hidden_size,
    hidden_row_stride,
    hidden_col_stride,
    weight_row_stride,
    weight_col_stride,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VOCAB_GROUP: tl.constexpr,
):
    num_row_tiles, num_vocab_tiles = tl.cdiv(num_rows, BLOCK_N), tl.cdiv(vocab_size, BLOCK_V)
    for index in tl.range(
        tl.program_id(0),
        num_row_tiles * num_vocab_tiles,
        tl.num_programs(0),
        flatten=TMA and not SPECIALIZE,
        warp_specialize=SPECIALIZE,
    ):
        row_tile, vocab_tile = _tile(index, num_row_tiles, num_vocab_tiles, VOCAB_GROUP)
        row_start, col_start = row_tile * BLOCK_N, vocab_tile * BLOCK_V
        rows = row_start + tl.arange(0, BLOCK_N)
        cols = col_start + tl.arange(0, BLOCK_V)
        logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in range(0, hidden_size, BLOCK_D):
            if TMA:
                h = hidden.load([row_start, k])
                w = weight.load([col_start, k])
            else:
                # Rows and columns past the end repeat the last; what they give is not stored.
                steps = (k + tl.arange(0, BLOCK_D)).to(tl.int64)
                near = steps < hidden_size
                row_offsets = tl.minimum(rows, num_rows - 1).to(tl.int64) * hidden_row_stride
                col_offsets = tl.minimum(cols, vocab_size - 1).to(tl.int64) * weight_row_stride
                h = tl.load(
                    hidden + row_offsets[:, None] + steps[None, :] * hidden_col_stride,
                    mask=near[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight + col_offsets[:, None] + steps[None, :] * weight_col_stride,
                    mask=near[None, :],
                    other=0.0,
                )
            if UPCAST:
                h, w = h.to(tl.float32), w.to(tl.float32)
            logits = tl.dot(h, w.T, logits, input_precision="ieee")
        _store_parts(
            logits, rows, col_start, bias_ptr, token_ids_ptr, temperatures_ptr, token_logits_ptr,
            parts_ptr, vocab_tile, num_vocab_tiles, num_rows, vocab_size, temperature, softcap,
            SOFTCAP, ENTROPY,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_vocab_tiles"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    token_logits_ptr,
    temperatures_ptr,  # or None
    logprobs_ptr,
    entropy_ptr,
    stats_ptr,
    num_rows,
    num_vocab_tiles,
    temperature,
    ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = rows < num_rows
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + rows, mask=real, other=1.0)
    else:
        temperature = tl.full((BLOCK_N,), temperature, tl.float32)
    scale = LOG2E / temperature
    part_max = tl.full((PARTS, BLOCK_N), -float("inf"), tl.float32)
    part_sum = tl.zeros((PARTS, BLOCK_N), tl.float32)
    part_dot = tl.zeros((PARTS, BLOCK_N), tl.float32)
    part_stride = num_vocab_tiles.to(tl.int64) * num_rows
    for start in range(0, num_vocab_tiles, PARTS):
        tiles = start + tl.arange(0, PARTS)
        mask = (tiles < num_vocab_tiles)[:, None] & real[None, :]
        part_ptr = parts_ptr + (tiles.to(tl.int64) * num_rows)[:, None] + rows[None, :]
        tile_max = tl.load(part_ptr, mask=mask, other=-float("inf"))
        tile_sum = tl.load(part_ptr + part_stride, mask=mask, other=0.0)
        tile_dot = tl.zeros((PARTS, BLOCK_N), tl.float32)
        if ENTROPY:
            tile_dot = tl.load(part_ptr + 2 * part_stride, mask=mask, other=0.0)
        new_max = tl.maximum(part_max, tile_max)
        part_sum, part_dot = _merge(part_max, part_sum, part_dot, new_max, scale, ENTROPY)
        tile_sum, tile_dot = _merge(tile_max, tile_sum, tile_dot, new_max, scale, ENTROPY)
        part_max, part_sum, part_dot = new_max, part_sum + tile_sum, part_dot + tile_dot
    row_max, log_sum, entropy = _merge_all(
        part_max, part_sum, part_dot, scale, ENTROPY, PART_DOUBLINGS
    )
    token_logits = tl.load(token_logits_ptr + rows, mask=real, other=0.0)
    tl.store(logprobs_ptr + rows, (token_logits - row_max) / temperature - log_sum, mask=real)
    tl.store(stats_ptr + rows, row_max, mask=real)
    tl.store(stats_ptr + num_rows + rows, log_sum, mask=real)
    if ENTROPY:
        tl.store(entropy_ptr + rows, entropy, mask=real)


def _tiles(
    rows: int,
    vocab: int,
    depth: int,
    warps: int,
    stages: int,
    tma: bool = False,
    specialize: bool = False,
) -> Configuration:
    blocks = {"BLOCK_N": rows, "BLOCK_V": vocab, "BLOCK_D": depth, "VOCAB_GROUP": 16}
    return Configuration(warps, stages, blocks | {"TMA": tma, "SPECIALIZE": specialize})


# For each target the choices for 16-bit inputs; the first one whose needs are met is taken.
LINEAR_CONFIGURATIONS = {
    "sm_80": [_tiles(128, 128, 64, 8, 3)],
    "sm_90": [
        _tiles(128, 256, 64, 8, 3, tma=True),
        _tiles(128, 128, 64, 8, 4, tma=True),
        _tiles(128, 128, 64, 8, 4),
    ],
    "sm_100": [_tiles(128, 128, 64, 8, 4, tma=True), _tiles(128, 128, 64, 8, 4)],
    "gfx942": [_tiles(128, 128, 64, 4, 2)],
}
# The compiler's warp specialisation, to be put first where it is measured to win. Triton 3.6 has it
# for Hopper with four warps, which it splits over two consumers, and 3.9 for Blackwell.
SPECIALIZED = {
    ("3.6", "sm_90"): _tiles(128, 256, 64, 4, 3, tma=True, specialize=True),
    ("3.9", "sm_100"): _tiles(128, 128, 64, 8, 3, tma=True, specialize=True),
}
# float32 products keep all their bits (no TF32), on the vector units.
FLOAT32_CONFIGURATION = _tiles(64, 64, 16, 8, 2)
MERGE_CONFIGURATION = Configuration(4, 1, {"BLOCK_N": 16})


def _target(device: torch.device) -> str:
    """The entry of LINEAR_CONFIGURATIONS for a device; the least demanding one by default."""
    if INTERPRETING:
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def _takes_tma(tensor: torch.Tensor) -> bool:
    """Whether a matrix can be described to the copy engine: 16-byte rows, unit column stride."""
    bytes_a_row = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and bytes_a_row % 16 == 0 and tensor.data_ptr() % 16 == 0


def fits_softcap(configuration: Configuration) -> bool:
    """Whether the cap's arithmetic finds registers beside the accumulator of a tile."""
    return configuration.constants["BLOCK_V"] <= 128


def linear_configuration(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float
) -> Configuration:
    """The configuration for these inputs, from device, dtype, alignment and softcap alone."""
    if hidden.dtype == torch.float32:
        return FLOAT32_CONFIGURATION
    tma = _takes_tma(hidden) and _takes_tma(weight)
    return next(
        configuration
        for configuration in LINEAR_CONFIGURATIONS[_target(hidden.device)]
        if (tma or not configuration.constants["TMA"])
        and (not softcap or fits_softcap(configuration))
    )


def linear_forward_triton(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    return_entropy: bool,
    configuration: Configuration | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs [N], entropy [N] or [0], and stats [2, N] = (max, log_sum), all fp32.

    hidden: [N, D] and weight: [V, D] of one dtype, fp32, bf16 or fp16, any strides; every row is
    trained. bias: [V] or None. The rest as in forward_triton. configuration: None for the rule.
    Raises ValueError where hidden and weight differ in dtype.
    """
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"weight must have the dtype of hidden ({hidden.dtype}), not {weight.dtype}"
        )
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    logprobs = hidden.new_empty(num_rows, dtype=torch.float32)
    entropy = hidden.new_empty(num_rows if return_entropy else 0, dtype=torch.float32)
    stats = hidden.new_empty(2, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return logprobs, entropy, stats
    configuration = configuration or linear_configuration(hidden, weight, softcap)
    blocks = configuration.constants
    num_vocab_tiles = -(-vocab_size // blocks["BLOCK_V"])
    num_tiles = -(-num_rows // blocks["BLOCK_N"]) * num_vocab_tiles
    num_parts = 3 if return_entropy else 2
    parts = logprobs.new_empty(num_parts, num_vocab_tiles, num_rows)
    # A token outside the vocabulary is in no tile: its logit stays NaN.
    token_logits = torch.full_like(logprobs, torch.nan)
    temperatures = None if temperatures is None else temperatures.float().contiguous()
    matrices: tuple = (hidden, weight)
    if blocks["TMA"]:
        describe = importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor
        matrices = (
            describe.from_tensor(hidden, [blocks["BLOCK_N"], blocks["BLOCK_D"]]),
            describe.from_tensor(weight, [blocks["BLOCK_V"], blocks["BLOCK_D"]]),
        )
    _linear_kernel[(min(num_tiles, num_processors(hidden.device)),)](
        *matrices,
        None if bias is None else bias.contiguous(),
        token_ids.contiguous(),
        temperatures,
        token_logits,
        parts,
        num_rows,
        vocab_size,
        hidden.shape[1],
        *hidden.stride(),
        *weight.stride(),
        temperature,
        softcap,
        softcap != 0.0,
        return_entropy,
        **configuration.arguments(),
    )
    _merge_kernel[(-(-num_rows // MERGE_CONFIGURATION.constants["BLOCK_N"]),)](
        parts,
        token_logits,
        temperatures,
        logprobs,
        entropy,
        stats,
        num_rows,
        num_vocab_tiles,
        temperature,
        return_entropy,
        **MERGE_CONFIGURATION.arguments(),
    )
    return logprobs, entropy, stats

"""Logits of hidden states by chunks of rows that share one buffer, and the gradients behind them.

    logits = hidden @ weight.T + bias          hidden [N, D], weight [V, D], bias [V]
    grad_hidden = dlogits @ weight,  grad_weight = dlogits.T @ hidden,  grad_bias = sum dlogits

The logits are float32 (float64 for float64) whatever the inputs' dtype, because logits rounded to
bf16 give log-probabilities wrong by 0.03 to 0.08. The weight's gradient is summed over the chunks
in float32. How a product reaches that precision is a choice of class below; the rest is shared.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from fuserl_kernels import native
from fuserl_kernels.packed_weight import PackedWeight
from fuserl_kernels.reference.sequences import compute_dtype

_NARROW = (torch.bfloat16, torch.float16)
_MIN_BUFFER_BYTES = 64 << 20
_MAX_BUFFER_BYTES = 1 << 30
_TILE_ELEMENTS = 1 << 22  # of a weight tile that is converted or multiplied at a time
_ROW_MULTIPLE = 64
_MAX_PACKED_BYTES = 96 << 20  # of a weight that is packed whole


class Kernels(NamedTuple):
    """What the ops with a projection run on each chunk of logits."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    backward: Callable[..., torch.Tensor]
    products: "Callable[[torch.Tensor, torch.Tensor | None], Products]"


class Products:
    """Products in max(float32, input dtype); narrower weights are widened a tile at a time."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.dtype = compute_dtype(weight)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.gradient_dtype = self.dtype  # of dlogits

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """out [n, V] = hidden [n, D] @ weight.T + bias."""
        hidden = hidden.to(self.dtype)
        for columns, tile in self._wide_tiles():
            if self.bias is None:
                torch.mm(hidden, tile.t(), out=out[:, columns])
            else:
                torch.addmm(self.bias[columns], hidden, tile.t(), out=out[:, columns])

    def grad_hidden(self, gradient: torch.Tensor) -> torch.Tensor:
        """gradient [n, V] @ weight."""
        total: torch.Tensor | None = None
        for columns, tile in self._wide_tiles():
            if total is None:
                total = torch.mm(gradient[:, columns], tile)
            else:
                total.addmm_(gradient[:, columns], tile)
        assert total is not None  # V > 0
        return total

    def add_grad_weight(
        self, gradient: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, fresh: bool
    ) -> None:
        """total [V, D] += gradient.T @ hidden, or = where `total` holds nothing yet."""
        total.addmm_(gradient.t(), hidden.to(self.dtype), beta=0.0 if fresh else 1.0)

    def _tiles(self) -> Iterator[slice]:
        vocab_size, hidden_size = self.weight.shape
        step = max(1, _TILE_ELEMENTS // max(1, hidden_size))
        for start in range(0, vocab_size, step):
            yield slice(start, min(start + step, vocab_size))

    def _wide_tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        if self.weight.dtype == self.dtype:
            yield slice(0, self.weight.shape[0]), self.weight
            return
        for columns in self._tiles():
            yield columns, self.weight[columns].to(self.dtype)


class FixedProducts(Products):
    """The CPU's own: each logit is summed in the order of fixed_linear, so that a row has the same
    bits in any chunk, and in the decode loop. float32 logits of bf16 operands come out of one
    product. A small weight is packed once for all chunks; a large one a tile at a time for each,
    so that there is never a second copy of it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._narrow_bias = bias  # of the weight's dtype
        self._is_small = weight.nbytes <= _MAX_PACKED_BYTES

    @functools.cached_property
    def _packed(self) -> PackedWeight:
        return PackedWeight.of(self.weight)

    @functools.cached_property
    def _transposed(self) -> PackedWeight:
        return PackedWeight.of(self.weight.t())

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        if self._is_small:
            self._packed.linear(hidden, self._narrow_bias, out)
            return
        for columns in self._tiles():
            bias = None if self._narrow_bias is None else self._narrow_bias[columns]
            PackedWeight.of(self.weight[columns]).linear(hidden, bias, out[:, columns])

    def grad_hidden(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype != self.dtype:
            return super().grad_hidden(gradient)
        if self._is_small:
            return self._transposed.linear(gradient)
        total = gradient.new_zeros(gradient.shape[0], self.weight.shape[1])
        for columns in self._tiles():
            packed = PackedWeight.of(self.weight[columns].t())
            total += packed.linear(gradient[:, columns])
        return total

    def add_grad_weight(
        self, gradient: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, fresh: bool
    ) -> None:
        inputs = PackedWeight.of(hidden.to(self.dtype).t())
        for columns in self._tiles():
            part = gradient[:, columns].t()
            if fresh:
                inputs.linear(part, out=total[columns])
            else:
                total[columns].add_(inputs.linear(part))


class FixedLogits(FixedProducts):
    """bf16: torch's products behind the logits, which are faster than packing. Gradients of the
    logits are bf16, and so is what one chunk adds to the weight's gradient, before it is summed in
    float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self.gradient_dtype = weight.dtype

    def grad_hidden(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.mm(gradient, self.weight)

    def add_grad_weight(
        self, gradient: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, fresh: bool
    ) -> None:
        for columns in self._tiles():
            part = torch.mm(gradient[:, columns].t(), hidden)
            if fresh:
                total[columns].copy_(part)
            else:
                total[columns].add_(part.float())


class WideOutputProducts(Products):
    """CUDA: bf16 and float16 operands, float32 accumulated and written. Gradients of the logits
    are bf16; float16 could not hold them (a probability over a token count underflows), so float16
    takes the wide products behind the logits."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, bias)
        self._narrow = weight.dtype == torch.bfloat16
        if self._narrow:
            self.gradient_dtype = torch.bfloat16

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(hidden, self.weight.t(), out_dtype=torch.float32, out=out)
        if self.bias is not None:
            out.add_(self.bias)

    def grad_hidden(self, gradient: torch.Tensor) -> torch.Tensor:
        return torch.mm(gradient, self.weight) if self._narrow else super().grad_hidden(gradient)

    def add_grad_weight(
        self, gradient: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, fresh: bool
    ) -> None:
        if not self._narrow:
            super().add_grad_weight(gradient, hidden, total, fresh)
        elif fresh:
            torch.mm(gradient.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, gradient.t(), hidden, out_dtype=torch.float32, out=total)


def _has_bf16_units() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fast_products(weight: torch.Tensor, bias: torch.Tensor | None) -> Products:
    """The fastest products of full precision for the weight's device and dtype."""
    if weight.is_cuda:
        return (WideOutputProducts if weight.dtype in _NARROW else Products)(weight, bias)
    if native.why_absent() is not None or weight.dtype not in (torch.float32, *_NARROW):
        return Products(weight, bias)
    if weight.dtype == torch.bfloat16 and _has_bf16_units():
        return FixedLogits(weight, bias)
    return FixedProducts(weight, bias)


def chunk_rows(vocab_size: int, hidden_size: int, element_size: int, device_type: str) -> int:
    """Rows of logits in one chunk.

    Each chunk reads and writes the weight's gradient once. On a CPU that hides behind the product
    when the chunk has a few hundred rows: 3/8 of the hidden size make a buffer of 3/8 of the
    gradient. A GPU multiplies so much faster than it reads that the largest buffer is best."""
    row_bytes = vocab_size * element_size
    wanted = max(_MIN_BUFFER_BYTES, row_bytes * hidden_size * 3 // 8)
    if device_type == "cuda":
        wanted = _MAX_BUFFER_BYTES
    rows = min(wanted, _MAX_BUFFER_BYTES) // row_bytes
    return max(1, rows // _ROW_MULTIPLE * _ROW_MULTIPLE or rows)


class Projection:
    """The kept rows of hidden [N, D] times weight, a chunk at a time, and the gradients.

    kept: [n] int64, the rows that count, or None for all. Ask for the gradients wanted, then for
    each chunk call logits(), overwrite what it returned with dlogits, and call backward()."""

    def __init__(
        self,
        kernels: Kernels,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kept: torch.Tensor | None,
    ) -> None:
        self._products = kernels.products(weight, bias)
        self.weight = weight
        self._hidden, self._bias, self._kept = hidden, bias, kept
        self.num_rows = hidden.shape[0] if kept is None else kept.shape[0]
        vocab_size, hidden_size = weight.shape
        dtype = self._products.dtype
        self.capacity = chunk_rows(vocab_size, hidden_size, dtype.itemsize, weight.device.type)
        self._buffer = hidden.new_empty(min(self.capacity, self.num_rows), vocab_size, dtype=dtype)
        self._rows = hidden[:0]
        self._grad_hidden: torch.Tensor | None = None
        self._grad_weight: torch.Tensor | None = None
        self._grad_bias: torch.Tensor | None = None
        self._weight_is_fresh = False

    def want_gradients(
        self, hidden: bool, weight: bool, bias: bool, weight_total: torch.Tensor | None = None
    ) -> None:
        """weight_total: float32 [V, D] to add the weight's gradient to, instead of a new one."""
        dtype = self._products.dtype
        if hidden:
            self._grad_hidden = torch.zeros_like(
                self._hidden, memory_format=torch.contiguous_format
            )
        if weight_total is not None:
            self._grad_weight = weight_total
        elif weight:
            self._grad_weight = self.weight.new_empty(self.weight.shape, dtype=dtype)
            self._weight_is_fresh = True
        if bias and self._bias is not None:
            self._grad_bias = self._bias.new_zeros(self._bias.shape, dtype=dtype)

    def slices(self, start: int, stop: int) -> Sequence[slice]:
        """Kept rows start to stop, cut into chunks."""
        return [
            slice(first, min(first + self.capacity, stop))
            for first in range(start, stop, self.capacity)
        ]

    def take(self, tensor: torch.Tensor, rows: slice) -> torch.Tensor:
        """The values of a chunk's rows in a tensor over all rows."""
        return tensor[rows] if self._kept is None else tensor[self._kept[rows]]

    def take_optional(self, tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
        return None if tensor is None else self.take(tensor, rows)

    def put(self, tensor: torch.Tensor, rows: slice, values: torch.Tensor) -> None:
        """Write the values of a chunk's rows into a tensor whose last dimension is all rows."""
        if self._kept is None:
            tensor[..., rows] = values
        else:
            tensor.index_copy_(-1, self._kept[rows], values)

    def logits(self, rows: slice) -> torch.Tensor:
        """float32 (float64) [rows, V], valid until the next call."""
        self._rows = self.take(self._hidden, rows)
        logits = self._buffer[: rows.stop - rows.start]
        self._products.logits(self._rows, logits)
        return logits

    def gradient_over(self, logits: torch.Tensor) -> torch.Tensor:
        """Where dlogits of a chunk belongs: over the logits' own storage, row by row; in the
        products' dtype, so perhaps in the first half of each row."""
        dtype = self._products.gradient_dtype
        return logits if logits.dtype == dtype else logits.view(dtype)[:, : logits.shape[1]]

    def backward(self, rows: slice, gradient: torch.Tensor) -> None:
        """Add what the gradient [rows, V] of the last logits gives."""
        if self._grad_hidden is not None:
            part = self._products.grad_hidden(gradient).to(self._grad_hidden.dtype)
            if self._kept is None:
                self._grad_hidden[rows] = part
            else:
                self._grad_hidden.index_copy_(0, self._kept[rows], part)
        if self._grad_weight is not None:
            self._products.add_grad_weight(
                gradient, self._rows, self._grad_weight, self._weight_is_fresh
            )
            self._weight_is_fresh = False
        if self._grad_bias is not None:
            self._grad_bias += gradient.sum(0, dtype=self._grad_bias.dtype)

    def gradients(
        self, weight_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of hidden, weight (in `weight_dtype`) and bias; [0] where not wanted. No chunk
        may follow."""
        del self._buffer  # its memory is free for the conversion
        weight, bias = self.weight, self.weight if self._bias is None else self._bias
        if self._grad_weight is not None and self._weight_is_fresh:  # no chunk came
            self._grad_weight.zero_()
        none_hidden, none_weight, none_bias = (
            self._hidden.new_empty(0),
            weight.new_empty(0, dtype=weight_dtype),
            bias.new_empty(0),
        )
        return (
            none_hidden if self._grad_hidden is None else self._grad_hidden,
            none_weight if self._grad_weight is None else self._grad_weight.to(weight_dtype),
            none_bias if self._grad_bias is None else self._grad_bias.to(bias.dtype),
        )

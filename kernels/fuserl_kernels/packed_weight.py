"""A weight laid out for the CPU's own products: panels of 16 outputs (csrc/cpu/product.h)."""

from dataclasses import dataclass

import torch

from fuserl_kernels import native

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A copy of a weight [num_outputs, num_inputs], float32, bf16 or fp16, on the CPU."""

    panels: torch.Tensor  # [bytes] uint8, aligned
    dtype: torch.dtype
    num_outputs: int
    num_inputs: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> "PackedWeight":
        """weight: [num_outputs, num_inputs]. RuntimeError without the compiled module, ValueError
        for a weight that is not on the CPU."""
        if weight.device.type != "cpu":
            raise ValueError(f"a weight is packed on the CPU, and this one is on {weight.device}")
        if 1 not in weight.stride():
            weight = weight.contiguous()
        module, dtype = native.module(), native.dtype(weight)
        num_outputs, num_inputs = weight.shape
        num_bytes = module.packed_bytes(dtype, num_outputs, num_inputs)
        room = torch.empty(num_bytes + _ALIGNMENT, dtype=torch.uint8, device="cpu")
        start = -room.data_ptr() % _ALIGNMENT
        panels = room[start : start + num_bytes]
        module.pack_weight(
            dtype=dtype,
            weight=weight.data_ptr(),
            num_outputs=num_outputs,
            num_inputs=num_inputs,
            row_stride=weight.stride(0),
            column_stride=weight.stride(1),
            panels=panels.data_ptr(),
            num_threads=torch.get_num_threads(),
        )
        return cls(panels, weight.dtype, num_outputs, num_inputs)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    def linear(
        self,
        x: torch.Tensor,  # [N, num_inputs]
        bias: torch.Tensor | None = None,  # [num_outputs] of the weight's dtype
        out: torch.Tensor | None = None,  # [N, num_outputs], unit column stride
    ) -> torch.Tensor:
        """x weight^T + bias, in `out` (of the weight's dtype or float32) or in a new tensor of the
        weight's dtype, summed in float32 in an order that depends on num_inputs alone. No
        gradient. Raises ValueError for what does not fit."""
        self._check(x, bias, out)
        if x.stride(1) != 1 and x.dtype != torch.float32:
            x = x.contiguous()
        if bias is not None:
            bias = bias.contiguous()  # alive until the call returns
        if out is None:
            out = x.new_empty(x.shape[0], self.num_outputs)
        native.module().product(
            rows=x.data_ptr(),
            num_rows=x.shape[0],
            row_stride=x.stride(0),
            input_stride=x.stride(1),
            panels=self.panels.data_ptr(),
            dtype=native.dtype(x),
            num_outputs=self.num_outputs,
            num_inputs=self.num_inputs,
            bias=native.address(bias),
            out=out.data_ptr(),
            out_dtype=native.dtype(out),
            out_stride=out.stride(0),
            num_threads=torch.get_num_threads(),
        )
        return out

    def _check(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> None:
        """The compiled code reads and writes what it is told is there."""
        if x.dim() != 2 or x.shape[1] != self.num_inputs or x.dtype != self.dtype or x.is_cuda:
            raise ValueError(
                f"x must be {self.dtype} [N, {self.num_inputs}] on the CPU, "
                f"not {x.dtype} {list(x.shape)} on {x.device}"
            )
        if bias is not None and (bias.shape != (self.num_outputs,) or bias.dtype != self.dtype):
            raise ValueError(
                f"bias must be {self.dtype} [{self.num_outputs}], "
                f"not {bias.dtype} {list(bias.shape)}"
            )
        if out is not None and (
            out.shape != (x.shape[0], self.num_outputs)
            or out.dtype not in (self.dtype, torch.float32)
            or (out.stride(1) != 1 and out.shape[1] > 1)
        ):
            raise ValueError(
                f"out must be {self.dtype} or float32 [{x.shape[0]}, {self.num_outputs}] with unit "
                f"column stride, not {out.dtype} {list(out.shape)}"
            )

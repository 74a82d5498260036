"""How a decoder's products are made: by torch, in a fixed order, or from weights packed before.

A library's product sums in another order for one row than for many, so that what a decoder says of
a token depends on the batch around it (in fp32 by a part in ten million, which now and then changes
a sampled token). Products in a fixed order do not: see fuserl_kernels/fixed_linear.py.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fuserl_kernels as fk
from fuserl.model.lora_linear import LoRALinear
from fuserl_kernels import backend
from fuserl_kernels.packed_weight import PackedWeight

Product = Callable[[nn.Linear, Tensor], Tensor]
"""linear, x [N, in] -> [N, out]."""


def torch_product(linear: nn.Linear, x: Tensor) -> Tensor:
    return linear(x)


def fixed_product(linear: nn.Linear, x: Tensor) -> Tensor:
    return fk.fixed_linear(x, linear.weight, linear.bias)


_PRODUCTS: backend.Table = {
    "native": fixed_product,
    "triton": torch_product,
    "reference": torch_product,
}


def training_product(linear: nn.Linear, x: Tensor) -> Tensor:
    """With gradients: in a fixed order where that is compiled, which is the faster one too; through
    adapters as they are."""
    if isinstance(linear, LoRALinear):
        return linear(x)
    return backend.select("product", _PRODUCTS, x)(linear, x)


class PackedProducts:
    """A copy of all weights of a decoder's products and of its head, packed for the CPU, adapters
    merged. No gradient; made anew when weights change."""

    def __init__(self, trunk: nn.Module, head: Tensor) -> None:
        """head: the vocabulary's weight, [V, D]."""
        self._packed = {linear: PackedWeight.of(merged_weight(linear)) for linear in linears(trunk)}
        self.head = PackedWeight.of(head.detach())

    def of(self, linear: nn.Linear) -> PackedWeight:
        return self._packed[linear]

    @property
    def num_bytes(self) -> int:
        return self.head.nbytes + sum(packed.nbytes for packed in self._packed.values())

    def __call__(self, linear: nn.Linear, x: Tensor) -> Tensor:
        return self._packed[linear].linear(x, linear.bias)


def linears(trunk: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in trunk.modules() if isinstance(module, nn.Linear))


@torch.no_grad()
def merged_weight(linear: nn.Linear) -> Tensor:
    """[out, in]: with adapters that are on, their product added."""
    if isinstance(linear, LoRALinear) and linear.is_on:
        return linear.merged_weight()
    return linear.weight.detach()

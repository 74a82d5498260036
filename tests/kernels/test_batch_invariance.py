"""What a decode step is made of gives a row the same bits alone, in any batch, in any order, among
copies of itself, beside rows that are broken, and beside rows that are off.

A completion then depends on its request alone, as far as the products between these ops do. The
reference is left out: it is the definition of values, not of the order of sums. Triton's kernels
run in its interpreter, which sums attention's products as the source says and not as a GPU's units
do: test_gpu_decoder_attention.py has those.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from attention_cases import problem
from kernel_testing import runnable
from torch import Tensor

import fuserl_kernels as fk
from fuserl_kernels.glu import FORWARD

BACKENDS = [name for name in runnable(FORWARD) if name != "reference"]
DTYPES = [torch.float32, torch.bfloat16]
NUM_ROWS = 6
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rows:
    """inputs: one row each of the op's arguments, [N, ...]. run: the op, results [N, ...]. off:
    turns the marked rows off, where the op has such; to poison them is the other way."""

    inputs: tuple[Tensor, ...]
    run: Callable[..., Outputs]
    off: Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]] | None = None

    def __getitem__(self, rows: Tensor) -> "Rows":
        return replace(self, inputs=tuple(x[rows] for x in self.inputs))

    def __call__(self) -> Outputs:
        return self.run(*self.inputs)

    def poisoned(self, rows: Tensor) -> "Rows":
        """NaN in every floating-point input of these rows."""
        mask = torch.zeros(NUM_ROWS, dtype=torch.bool).index_fill(0, rows, True)
        inputs = [
            torch.where(mask.view(-1, *[1] * (x.dim() - 1)), torch.nan, x) if x.is_floating_point()
            else x
            for x in self.inputs
        ]  # fmt: skip
        return replace(self, inputs=tuple(inputs))


def norm(kind: str, with_residual: bool, width: int, dtype: torch.dtype) -> Rows:
    weight, bias = (1 + torch.randn(2, width)).to(dtype).unbind()
    x, residual = torch.randn(2, NUM_ROWS, width).to(dtype).unbind()

    def run(x: Tensor, residual: Tensor) -> Outputs:
        given = {"residual": residual} if with_residual else {}
        if kind == "rms":
            found = fk.rms_norm(x, weight, weight_offset=1.0, **given)
        else:
            found = fk.layer_norm(x, weight, bias, **given)
        return found if with_residual else (found,)

    return Rows((x, residual), run)


def rotary(interleaved: bool, norms: bool, dtype: torch.dtype) -> Rows:
    options = {"num_heads": 3, "num_kv_heads": 1, "interleaved": interleaved}
    if norms:
        weights = (1 + torch.randn(2, 40)).to(dtype).unbind()
        options |= dict(zip(("q_norm_weight", "k_norm_weight"), weights, strict=True))
    cos, sin = torch.randn(2, 9, 12).unbind()
    return Rows(
        (torch.randn(NUM_ROWS, 5 * 40).to(dtype), torch.randint(9, (NUM_ROWS,))),
        lambda qkv, positions: fk.rotary(qkv, cos, sin, positions, **options),
    )


def rotary_kv_write(norms: bool, dtype: torch.dtype) -> Rows:
    """Results: the query, and what each row's place in the cache holds. A row that comes twice
    writes the same numbers to one place."""
    plain = rotary(False, norms, dtype)
    options = {"num_heads": 3, "num_kv_heads": 1}
    if norms:
        weights = (1 + torch.randn(2, 40)).to(dtype).unbind()
        options |= dict(zip(("q_norm_weight", "k_norm_weight"), weights, strict=True))
    cos, sin = torch.randn(2, 9, 12).unbind()

    def run(qkv: Tensor, positions: Tensor, slots: Tensor, offsets: Tensor) -> Outputs:
        caches = [torch.full((NUM_ROWS, 1, 4, 40), 7.0, dtype=dtype) for _ in range(2)]
        query = fk.rotary_kv_write(qkv, cos, sin, positions, *caches, slots, offsets, **options)
        at = slots.clamp(min=0)
        written = [cache[at, :, offsets] for cache in caches]
        kept = torch.full((NUM_ROWS, 4), True).index_put(
            (slots[slots >= 0], offsets[slots >= 0]), torch.tensor(False)
        )
        assert all((cache.transpose(1, 2)[kept] == 7.0).all() for cache in caches)
        return query, *written

    slots = torch.randperm(NUM_ROWS)
    return Rows((*plain.inputs, slots, torch.randint(4, (NUM_ROWS,))), run, partial(slot_off, 2))


def slot_off(at: int, inputs: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, ...]:
    return *inputs[:at], inputs[at].index_fill(0, rows, -1), *inputs[at + 1 :]


def glu(activation: str, dtype: torch.dtype) -> Rows:
    gate_up = 3 * torch.randn(NUM_ROWS, 2 * 1100)
    return Rows((gate_up.to(dtype),), lambda x: (fk.glu(x, activation=activation),))


def attention(
    prefix: tuple[int, int] | None, window: int | None, capacity: int, dtype: torch.dtype
) -> Rows:
    case = problem(NUM_ROWS, (2, 1), 32, capacity, prefix, dtype)
    ids = case.prefix_ids if case.prefix_ids is not None else torch.zeros(NUM_ROWS).long()

    def run(query: Tensor, lengths: Tensor, slots: Tensor, prefix_ids: Tensor) -> Outputs:
        given = {"query": query, "lengths": lengths, "slots": slots}
        if prefix is not None:
            given["prefix_ids"] = prefix_ids
        return (replace(case, **given).run(window=window, softcap=20.0),)

    assert case.slots is not None
    return Rows((case.query, case.lengths, case.slots, ids), run, partial(slot_off, 2))


def sampling(options: dict[str, float], dtype: torch.dtype) -> Rows:
    requests, positions = torch.randint(2**40, (NUM_ROWS,)), torch.randint(2**20, (NUM_ROWS,))
    logits = (3 * torch.randn(NUM_ROWS, 777)).to(dtype)
    return Rows(
        (logits, requests, positions),
        lambda x, ids, at: fk.sample_tokens(
            x, seed=2**40 + 3, request_ids=ids, positions=at, **options
        ),
    )


CASES: dict[str, Callable[[torch.dtype], Rows]] = {
    "rms_norm": partial(norm, "rms", False, 96),
    "rms_norm with residual": partial(norm, "rms", True, 96),
    "rms_norm of wide rows": partial(norm, "rms", True, 20_011),
    "layer_norm": partial(norm, "layer", False, 100),
    "layer_norm with residual": partial(norm, "layer", True, 100),
    "rotary": partial(rotary, False, False),
    "rotary with norms": partial(rotary, True, True),
    "rotary_kv_write": partial(rotary_kv_write, False),
    "rotary_kv_write with norms": partial(rotary_kv_write, True),
    "glu silu": partial(glu, "silu"),
    "glu gelu_tanh": partial(glu, "gelu_tanh"),
    "decode_attention in one split": partial(attention, None, None, 40),
    "decode_attention with prompts": partial(attention, (2, 270), None, 20),
    "decode_attention with a window": partial(attention, (3, 30), 33, 300),
    "sample_tokens": partial(sampling, {}),
    "sample_tokens greedy": partial(sampling, {"temperature": 0.0}),
    "sample_tokens truncated": partial(
        sampling, {"temperature": 0.8, "top_k": 90, "top_p": 0.9, "min_p": 0.002}
    ),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow|All-NaN)"),
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("dtype", DTYPES),
]
WITH_OFF = [name for name in CASES if "attention" in name or "write" in name]


def assert_bits(got: Outputs, want: Outputs) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert not theirs.isnan().any()
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", CASES)
def test_alone_in_another_order_and_among_copies(
    name: str, dtype: torch.dtype, backend: str
) -> None:
    rows = CASES[name](dtype)
    with fk.use_backend(backend):
        whole = rows()
        alone = [torch.tensor([0]), torch.tensor([NUM_ROWS - 1])]
        for some in (*alone, torch.randperm(NUM_ROWS), torch.tensor([4, 1, *[2] * 17])):
            assert_bits(rows[some](), tuple(x[some] for x in whole))


@pytest.mark.parametrize("name", CASES)
def test_beside_broken_rows(name: str, dtype: torch.dtype, backend: str) -> None:
    rows, bad, good = CASES[name](dtype), torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])
    with fk.use_backend(backend):
        whole, broken = rows(), rows.poisoned(bad)()
    assert_bits(tuple(x[good] for x in broken), tuple(x[good] for x in whole))
    floating = [x for x in broken if x.is_floating_point()]
    assert any(x[3].isnan().any() for x in floating), "nothing was broken"


@pytest.mark.parametrize("name", WITH_OFF)
def test_beside_rows_that_are_off(name: str, dtype: torch.dtype, backend: str) -> None:
    rows, out, live = CASES[name](dtype), torch.tensor([1, 5]), torch.tensor([0, 2, 3, 4])
    assert rows.off is not None
    with fk.use_backend(backend):
        whole, some = rows(), replace(rows, inputs=rows.off(rows.inputs, out))()
    assert_bits(tuple(x[live] for x in some), tuple(x[live] for x in whole))

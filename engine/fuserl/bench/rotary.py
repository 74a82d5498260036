"""The rotation of query and key heads by their position, and the write into a decoder's caches.

hidden_size is that of the query heads: heads of 64, a key head for each four query heads.
"""

import torch

import fuserl_kernels as fk
from fuserl.bench.case import Case, Cost
from fuserl.bench.problem import Problem
from fuserl.bench.rivals import Function, load
from fuserl.bench.truth import Tensors, Truth

HEAD_DIM = 64
NUM_POSITIONS = 4096
CACHE_LENGTH = 256


def _counts(case: Case) -> tuple[int, int]:
    """num_heads, num_kv_heads"""
    num_heads = max(1, case.hidden_size // HEAD_DIM)
    return num_heads, max(1, num_heads // 4)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [N, heads, 64]; cos, sin [N, 1, 32]."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _eager(
    case: Case, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> Tensors:
    """query, key, value in the dtype of qkv."""
    num_heads, num_kv_heads = _counts(case)
    heads = qkv.view(qkv.shape[0], -1, HEAD_DIM)
    query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    c, s = (table[positions].to(qkv.dtype).unsqueeze(1) for table in (cos, sin))
    return _turn(query, c, s), _turn(key, c, s), value


def _inputs(case: Case, generator: torch.Generator) -> Tensors:
    """qkv, cos, sin, positions"""
    num_heads, num_kv_heads = _counts(case)
    shape = (case.num_rows, (num_heads + 2 * num_kv_heads) * HEAD_DIM)
    qkv = torch.randn(shape, generator=generator, device=case.device).to(case.torch_dtype)
    slots = torch.arange(NUM_POSITIONS, device=case.device)
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2, device=case.device) / HEAD_DIM)
    angle = slots[:, None] * frequencies
    positions = torch.randint(
        NUM_POSITIONS, (case.num_rows,), generator=generator, device=case.device
    )
    return qkv, angle.cos(), angle.sin(), positions


def rotary_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: qkv, cos, sin, positions; outputs: query, key and value [N, heads, 64]."""
    generator = torch.Generator(case.device).manual_seed(seed)
    qkv, cos, sin, positions = _inputs(case, generator)
    outputs = _eager(case, qkv.double(), cos, sin, positions)
    cotangents = tuple(
        torch.randn(x.shape, generator=generator, device=case.device) for x in outputs
    )
    gradients: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    if case.backward:
        qkv.requires_grad_()
        grads = [g.to(case.torch_dtype).double() for g in cotangents]
        c, s = (table[positions].double().unsqueeze(1) for table in (cos, sin))
        slope = torch.cat((_turn(grads[0], c, -s), _turn(grads[1], c, -s), grads[2]), 1)
        gradients = ((torch.arange(case.num_rows, device=case.device), slope.flatten(1)),)
    return Problem(case, (qkv, cos, sin, positions), 1, cotangents, Truth(outputs, gradients))


def rotary_cost(case: Case) -> Cost:
    """Each element of the heads once in and once out, and backward as often again."""
    num_heads, num_kv_heads = _counts(case)
    passes = 4 if case.backward else 2
    size = (num_heads + 2 * num_kv_heads) * HEAD_DIM * case.torch_dtype.itemsize
    return Cost(passes * case.num_rows * size, 0)


def rotary_ours(case: Case) -> Function:
    num_heads, num_kv_heads = _counts(case)
    return lambda *inputs: fk.rotary(*inputs, num_heads=num_heads, num_kv_heads=num_kv_heads)


def rotary_eager(case: Case) -> Function:
    return lambda *inputs: _eager(case, *inputs)


def rotary_transformers(case: Case) -> Function:
    """apply_rotary_pos_emb on its [1, heads, N, 64], with the tables in the dtype of the heads."""
    apply = load("transformers.models.llama.modeling_llama", "apply_rotary_pos_emb")
    num_heads, num_kv_heads = _counts(case)

    def run(
        qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
    ) -> Tensors:
        heads = qkv.view(1, qkv.shape[0], -1, HEAD_DIM).transpose(1, 2)
        query, key, value = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
        c, s = (t[positions].to(qkv.dtype).repeat(1, 2).unsqueeze(0) for t in (cos, sin))
        turned = apply(query, key, c, s)
        return tuple(x.squeeze(0).transpose(0, 1) for x in (*turned, value))

    return run


def rotary_kv_write_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: those of rotary, key_cache and value_cache [N, kv heads, CACHE_LENGTH, 64], slots,
    offsets; outputs: query, and the caches with each token at its slot and offset."""
    generator = torch.Generator(case.device).manual_seed(seed)
    inputs = _inputs(case, generator)
    query, key, value = _eager(case, inputs[0].double(), *inputs[1:])
    shape = (case.num_rows, key.shape[1], CACHE_LENGTH, HEAD_DIM)
    slots = torch.randperm(case.num_rows, generator=generator, device=case.device)
    offsets = torch.randint(CACHE_LENGTH, (case.num_rows,), generator=generator, device=case.device)
    caches, exact = [], [query]
    for heads in (key, value):
        caches.append(torch.zeros(shape, dtype=case.torch_dtype, device=case.device))
        exact.append(caches[-1].double())
        exact[-1][slots, :, offsets] = heads
    return Problem(case, (*inputs, *caches, slots, offsets), 0, (), Truth(tuple(exact)))


def rotary_kv_write_ours(case: Case) -> Function:
    num_heads, num_kv_heads = _counts(case)

    def run(*inputs: torch.Tensor) -> Tensors:
        query = fk.rotary_kv_write(*inputs, num_heads=num_heads, num_kv_heads=num_kv_heads)
        return query, inputs[4], inputs[5]

    return run


def rotary_kv_write_eager(case: Case) -> Function:
    def run(*inputs: torch.Tensor) -> Tensors:
        key_cache, value_cache, slots, offsets = inputs[4:]
        query, key, value = _eager(case, *inputs[:4])
        key_cache[slots, :, offsets] = key
        value_cache[slots, :, offsets] = value
        return query, key_cache, value_cache

    return run

"""rotary and rotary_kv_write against float64, the modules of transformers, and their invariants."""

from dataclasses import dataclass

import pytest
import torch
from kernel_testing import assert_error_rule, opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import native
from fuserl_kernels.rotary import FORWARD, KV_WRITE

BACKENDS = runnable(FORWARD)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_POSITIONS = 11
needs_native = pytest.mark.skipif(
    native.why_absent() is not None, reason="native kernels are not built"
)


@dataclass(frozen=True)
class Heads:
    """What a model fixes: sizes, layout of the pairs, norms."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool = False
    norms: str = ""  # of "q" and "k"
    weight_offset: float = 0.0

    def options(self, weights):
        q, k = weights
        return {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "interleaved": self.interleaved,
            "q_norm_weight": q,
            "k_norm_weight": k,
            "weight_offset": self.weight_offset,
        }

    def row(self):
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


CASES = [
    Heads(4, 2, 64, 64),
    Heads(3, 1, 128, 128, norms="qk"),
    Heads(2, 2, 256, 64, interleaved=True),
    Heads(5, 1, 96, 96, norms="qk", weight_offset=1.0),
    Heads(1, 3, 80, 20, norms="k"),
    Heads(3, 3, 12, 4, interleaved=True, norms="q"),
    Heads(2, 1, 2, 2),
    Heads(2, 1, 34, 34, interleaved=True, norms="qk"),
    Heads(2, 2, 64, 0),
    Heads(2, 1, 40, 0, norms="qk"),
]
some_cases = pytest.mark.parametrize("heads", CASES[:4], ids=str)


def problem(heads, num_tokens=5, dtype=torch.float32, scale=1.0):
    """qkv, cos, sin, positions, and the norms' weights."""
    qkv = (torch.randn(num_tokens, heads.row()) * scale).to(dtype)
    angle = torch.randn(NUM_POSITIONS, heads.rotary_dim // 2) * 3
    weights = [
        torch.randn(heads.head_dim).to(dtype) if name in heads.norms else None for name in "qk"
    ]
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,))
    return qkv, 1.25 * angle.cos(), 1.25 * angle.sin(), positions, weights


def eager(heads, qkv, cos, sin, positions, weights):
    """In the dtype of qkv, rounding where transformers' modules do."""
    num_tokens, half = qkv.shape[0], heads.rotary_dim // 2
    kv = heads.num_kv_heads
    query, key, value = qkv.view(num_tokens, -1, heads.head_dim).split((heads.num_heads, kv, kv), 1)
    cos, sin = (table[positions].to(qkv.dtype).unsqueeze(1) for table in (cos, sin))

    def norm(x, weight):
        if weight is None:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return wide.to(x.dtype) * (heads.weight_offset + weight)

    def turn(x):
        turning, rest = x[..., : 2 * half], x[..., 2 * half :]
        if heads.interleaved:
            a, b = turning[..., ::2], turning[..., 1::2]
            together = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = turning[..., :half], turning[..., half:]
            together = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((together, rest), -1)

    return turn(norm(query, weights[0])), turn(norm(key, weights[1])), value


def ours(heads, qkv, cos, sin, positions, weights):
    return fk.rotary(qkv, cos, sin, positions, **heads.options(weights))


def with_gradients(function, heads, inputs, cotangents, dtype=None):
    """Outputs, and the gradients of qkv and the present weights."""
    qkv, cos, sin, positions, weights = inputs
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
        for x in (qkv, *weights)
    ]
    outputs = function(heads, leaves[0], cos, sin, positions, leaves[1:])
    wanted = [leaf for leaf in leaves if leaf is not None]
    seeds = [g.to(out.dtype) for g, out in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, wanted, seeds)
    return [x.detach() for x in (*outputs, *gradients)]


def cotangents_of(heads, num_tokens, dtype):
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    return [torch.randn(num_tokens, count, heads.head_dim).to(dtype) for count in counts]


def assert_right(heads, inputs):
    """Forward and gradients under the error rule; tolerance in units of the largest entry."""
    dtype = inputs[0].dtype
    seeds = cotangents_of(heads, inputs[0].shape[0], dtype)
    mine = with_gradients(ours, heads, inputs, seeds)
    theirs = with_gradients(eager, heads, inputs, seeds)
    truth = with_gradients(eager, heads, inputs, seeds, torch.float64)
    for a, b, exact in zip(mine, theirs, truth, strict=True):
        assert a.dtype == dtype
        unit = 2e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 16
        assert_error_rule(a, b, exact, unit * float(exact.abs().max()))


@pytest.mark.parametrize("heads", CASES, ids=str)
def test_the_definition_and_its_gradient(heads):
    if heads.head_dim > 40:
        heads = Heads(2, 1, 14, 8, heads.interleaved, heads.norms, heads.weight_offset)
    qkv, cos, sin, positions, weights = problem(heads, 3, torch.float64)
    leaves = [x.requires_grad_() for x in (qkv, *weights) if x is not None]
    for mine, want in zip(
        ours(heads, qkv, cos, sin, positions, weights),
        eager(heads, qkv, cos, sin, positions, weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, want)
    assert torch.autograd.gradcheck(
        lambda *_: ours(heads, qkv, cos, sin, positions, weights), leaves
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_no_more_than_eager_torch(backend, heads, dtype):
    with fk.use_backend(backend):
        assert_right(heads, problem(heads, 3 if backend == "triton" else 9, dtype))


@needs_native
@pytest.mark.parametrize("heads", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_instruction_set(instructions, heads, dtype):
    for num_tokens in (1, 7, 33):
        assert_right(heads, problem(heads, num_tokens, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-6, 1e4])
@some_cases
def test_small_and_large_values(backend, scale, heads):
    with fk.use_backend(backend):
        assert_right(heads, problem(heads, 3, torch.float32, scale))


# --- the cache


def caches(heads, num_slots, num_offsets, dtype, layout):
    """Two caches of 7s: contiguous, or with another order in memory and room around."""
    shape = (num_slots, heads.num_kv_heads, num_offsets, heads.head_dim)
    if layout == "contiguous":
        return torch.full((2, *shape), 7.0, dtype=dtype).unbind()
    room = torch.full((2, num_offsets + 2, num_slots, shape[1], shape[3] + 6), 7.0, dtype=dtype)
    key, value = room[:, 1:-1, ..., 3:-3].permute(0, 2, 3, 1, 4).unbind()
    return key, value


@pytest.mark.parametrize("backend", runnable(KV_WRITE))
@pytest.mark.parametrize("heads", CASES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_written_and_returned_heads_have_the_same_bits(backend, heads, layout):
    dtype = DTYPES[len(heads.norms) % 3]
    *inputs, weights = problem(heads, 5, dtype)
    key_cache, value_cache = caches(heads, 4, 3, dtype, layout)
    slots, offsets = torch.tensor([3, -1, 0, 3, -5]), torch.tensor([2, 0, 1, 0, 99])
    with fk.use_backend(backend):
        query, key, value = fk.rotary(*inputs, **heads.options(weights))
        wanted = [torch.full_like(x, 7.0) for x in (key_cache, value_cache)]
        for n in (0, 2, 3):
            wanted[0][slots[n], :, offsets[n]] = key[n]
            wanted[1][slots[n], :, offsets[n]] = value[n]
        got = fk.rotary_kv_write(
            *inputs, key_cache, value_cache, slots, offsets, **heads.options(weights)
        )
    assert torch.equal(got, query)
    assert torch.equal(key_cache, wanted[0])
    assert torch.equal(value_cache, wanted[1])
    if layout == "strided":
        around = torch.as_strided(key_cache, (3,), (1,), key_cache.storage_offset() - 3)
        assert (around == 7.0).all()


@pytest.mark.parametrize("backend", runnable(KV_WRITE))
def test_a_saved_cache_tells_that_it_changed(backend):
    heads = CASES[0]
    *inputs, weights = problem(heads, 1)
    key_cache, value_cache = caches(heads, 1, 1, torch.float32, "contiguous")
    factor = torch.ones(1, requires_grad=True)
    product = (factor * key_cache).sum()
    slots = torch.zeros(1, dtype=torch.int64)
    with fk.use_backend(backend):
        fk.rotary_kv_write(*inputs, key_cache, value_cache, slots, slots, **heads.options(weights))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        with torch.inference_mode():  # where tensors count no versions
            key_cache, value_cache = caches(heads, 1, 1, torch.float32, "contiguous")
            fk.rotary_kv_write(
                *inputs, key_cache, value_cache, slots, slots, **heads.options(weights)
            )
    assert (value_cache != 7.0).all()


# --- bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@some_cases
def test_a_token_has_the_same_bits_alone(backend, heads, dtype):
    qkv, cos, sin, positions, weights = problem(heads, 5, dtype)
    with fk.use_backend(backend):
        together = ours(heads, qkv, cos, sin, positions, weights)
        again = ours(heads, qkv, cos, sin, positions, weights)
        for rows in (slice(0, 1), slice(3, 5)):
            alone = ours(heads, qkv[rows], cos, sin, positions[rows], weights)
            for mine, other, repeated in zip(alone, together, again, strict=True):
                assert torch.equal(mine, other[rows])
                assert torch.equal(other, repeated)


@needs_native
@some_cases
def test_threads_change_no_bit(heads):
    """Gradients of the norms too."""
    inputs, seeds = problem(heads, 200), cotangents_of(heads, 200, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(ours, heads, inputs, seeds))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter does not run here")
def test_programs_of_several_tokens_sum_as_one(monkeypatch):
    """Where tokens outnumber programs each does several; their gradients stay right."""
    from fuserl_kernels import triton_rotary

    heads = Heads(3, 1, 64, 32, norms="qk")
    inputs = problem(heads, 7)
    monkeypatch.setattr(triton_rotary, "MAX_PROGRAMS", 3)
    with fk.use_backend("triton"):
        assert_right(heads, inputs)


# --- arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["q", "k", "v", "qv", "kv"])
@pytest.mark.parametrize("norms", ["", "qk"])
def test_outputs_that_nobody_uses(backend, used, norms):
    heads = Heads(2, 1, 16, 16, norms=norms)
    inputs = problem(heads, 4)
    with fk.use_backend(backend):
        seeds = cotangents_of(heads, 4, torch.float32)
        zeroed = [
            g if name in used else torch.zeros_like(g) for name, g in zip("qkv", seeds, strict=True)
        ]
        want = with_gradients(ours, heads, inputs, zeroed)[3:]
        qkv, cos, sin, positions, weights = inputs
        leaves = [x.detach().requires_grad_() for x in (qkv, *weights) if x is not None]
        outputs = ours(heads, leaves[0], cos, sin, positions, leaves[1:] or [None, None])
        loss = sum(
            (out * g).sum()
            for name, out, g in zip("qkv", outputs, seeds, strict=True)
            if name in used
        )
        got = torch.autograd.grad(loss, leaves)
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_weights_of_a_dtype_that_kernels_do_not_read(backend, dtype):
    heads = Heads(2, 1, 12, 8, norms="qk")
    *inputs, weights = problem(heads, 4)
    seeds = cotangents_of(heads, 4, torch.float32)
    narrow = [w.to(dtype) for w in weights]
    same = [w.float() for w in narrow]
    with fk.use_backend(backend):
        got = with_gradients(ours, heads, (*inputs, narrow), seeds)
        want = with_gradients(ours, heads, (*inputs, same), seeds)
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine.float(), other.to(mine.dtype).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_integer_dtypes(backend):
    heads = Heads(3, 1, 40, 24, norms="qk")
    qkv, cos, sin, positions, weights = problem(heads, 6)
    seeds = cotangents_of(heads, 6, torch.float32)
    strided = (
        qkv.repeat(1, 2)[:, : heads.row()],
        cos.t().contiguous().t(),
        torch.cat((sin, sin), 1)[:, 12:],
        positions.repeat_interleave(2)[::2].int(),
        [w.repeat_interleave(2)[::2] for w in weights],
    )
    turned = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in seeds]
    turned[0] = seeds[0].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    with fk.use_backend(backend):
        want = with_gradients(ours, heads, (qkv, cos, sin, positions, weights), seeds)
        for found in (
            with_gradients(ours, heads, strided, turned),
            with_gradients(ours, heads, (qkv.t().contiguous().t(), *strided[1:]), seeds),
        ):
            for mine, other in zip(found, want, strict=True):
                if backend == "reference":  # PyTorch's sums follow the strides
                    torch.testing.assert_close(mine, other)
                else:
                    assert torch.equal(mine, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norms", ["", "qk"])
def test_no_tokens(backend, norms):
    heads = Heads(2, 1, 16, 16, norms=norms)
    inputs = problem(heads, 0)
    key_cache, value_cache = caches(heads, 1, 1, torch.float32, "contiguous")
    with fk.use_backend(backend):
        found = with_gradients(ours, heads, inputs, cotangents_of(heads, 0, torch.float32))
        assert [x.shape for x in found[:4]] == [(0, 2, 16), (0, 1, 16), (0, 1, 16), (0, 64)]
        assert all((x == 0).all() for x in found[4:])
        query = fk.rotary_kv_write(
            *inputs[:4], key_cache, value_cache, inputs[3], inputs[3], **heads.options(inputs[4])
        )
    assert query.shape == (0, 2, 16)
    assert (key_cache == 7.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rotation_heads_are_split(backend):
    """Bits and NaN too, and nothing is asked of the positions."""
    heads = Heads(3, 2, 24, 0)
    qkv = problem(heads, 4)[0]
    qkv[1, 5], qkv[2, 7] = torch.nan, -0.0
    nothing, positions = torch.empty(0, 0), torch.full((4,), 99)
    with fk.use_backend(backend):
        found = torch.cat(
            fk.rotary(qkv, nothing, nothing, positions, **heads.options([None] * 2)), 1
        )
    assert torch.equal(found.flatten(1).view(torch.int32), qkv.view(torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    for heads in (Heads(2, 1, 12, 8, norms="qk"), Heads(2, 1, 6, 6)):
        qkv, cos, sin, positions, (q, k) = problem(heads, 3)
        options = (2, 1, False, q, k, 1e-6, 0.5)
        seeds = cotangents_of(heads, 3, torch.float32)
        key_cache, value_cache = caches(heads, 3, 2, torch.float32, "contiguous")
        slots, offsets = torch.tensor([2, -1, 0]), torch.tensor([0, 0, 1])
        with fk.use_backend(backend):
            opcheck(
                "rotary_bwd", seeds[0], None, *seeds[1:], cos, sin, positions,
                qkv if heads.norms else None, heads.head_dim, *options,
            )  # fmt: skip
            opcheck(
                "rotary_kv_write", qkv, cos, sin, positions, key_cache, value_cache, slots, offsets,
                *options,
            )  # fmt: skip
            for leaf in (x for x in (qkv, q, k) if x is not None):
                leaf.requires_grad_()
            opcheck("rotary", qkv, cos, sin, positions, *options)


@pytest.mark.parametrize("norms", ["", "qk"])
def test_compiles_whole(norms):
    heads = Heads(2, 1, 16, 8, norms=norms)
    qkv, cos, sin, positions, weights = problem(heads, 3)
    leaves = [x.requires_grad_() for x in (qkv, *weights) if x is not None]

    def train(scale):
        outputs = ours(heads, qkv * scale, cos, sin, positions, weights)
        return sum(x.square().sum() for x in outputs)

    def decode(key_cache, value_cache):
        query = fk.rotary_kv_write(
            qkv, cos, sin, positions, key_cache, value_cache, positions % 3, positions,
            **heads.options(weights),
        )  # fmt: skip
        return query + key_cache.sum()

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(2.0), leaves),
        torch.autograd.grad(train(2.0), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        positions.copy_(torch.arange(3))
        expected, found = (caches(heads, 3, 3, torch.float32, "contiguous") for _ in range(2))
        compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*found), decode(*expected))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_no_second_derivative():
    heads = CASES[1]
    qkv, cos, sin, positions, weights = problem(heads)
    qkv.requires_grad_()
    query, _, _ = ours(heads, qkv, cos, sin, positions, weights)
    (first,) = torch.autograd.grad(query.sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once more"):
        first.sum().backward()


HEADS = Heads(2, 1, 8, 8, norms="qk")
GOOD = problem(HEADS, 3)
BAD = [
    ({"qkv": torch.ones(3, 32, dtype=torch.int64)}, "qkv"),
    ({"qkv": torch.randn(3, 4, 8)}, "qkv"),
    ({"qkv": torch.randn(3, 31)}, "qkv"),
    ({"qkv": torch.randn(3, 4 * 7)}, "qkv must have an even head_dim"),
    ({"qkv": torch.randn(3, 4 * 258)}, "qkv must have an even head_dim"),
    ({"cos": torch.randn(11, 4).double()}, "cos"),
    ({"cos": torch.randn(11)}, "cos"),
    ({"cos": torch.randn(11, 5), "sin": torch.randn(11, 5)}, "cos must have at most"),
    ({"sin": torch.randn(11, 4).bfloat16()}, "sin"),
    ({"sin": torch.randn(10, 4)}, "sin"),
    ({"positions": torch.randn(3)}, "positions"),
    ({"positions": torch.zeros(4, dtype=torch.int64)}, "positions"),
    ({"positions": torch.tensor([0, 11, 0])}, "positions must be below 11, found 11"),
    ({"positions": torch.tensor([0, 0, -1])}, "positions must be at least 0, found -1"),
    ({"num_heads": 0}, "num_heads"),
    ({"num_kv_heads": 0}, "num_kv_heads"),
    ({"q_norm_weight": torch.ones(9)}, "q_norm_weight"),
    ({"k_norm_weight": torch.ones(8, dtype=torch.int64)}, "k_norm_weight"),
    ({"eps": -1.0}, "eps"),
    ({"eps": None}, "eps must be a number"),
    ({"weight_offset": float("nan")}, "weight_offset"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=str)
def test_bad_arguments_are_named(change, message):
    names = dict(zip(("qkv", "cos", "sin", "positions"), GOOD[:4], strict=True))
    arguments = names | HEADS.options(GOOD[4]) | change
    key_cache, value_cache = caches(HEADS, 3, 4, torch.float32, "contiguous")
    zeros = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        fk.rotary(**arguments)
    with pytest.raises(ValueError, match=message):
        fk.rotary_kv_write(
            **arguments, key_cache=key_cache, value_cache=value_cache, slots=zeros, offsets=zeros
        )
    assert (key_cache == 7.0).all()


BAD_CACHES = [
    ({"key_cache": torch.zeros(3, 1, 4, 8).bfloat16()}, "key_cache"),
    ({"key_cache": torch.zeros(3, 4, 8)}, "key_cache"),
    ({"key_cache": torch.zeros(3, 2, 4, 8)}, "key_cache"),
    ({"key_cache": torch.zeros(3, 1, 8, 4).transpose(2, 3)}, "key_cache must have unit stride"),
    ({"key_cache": None}, "key_cache"),
    ({"value_cache": torch.zeros(3, 1, 5, 8)}, "value_cache"),
    ({"value_cache": torch.zeros(3, 1, 4, 8, requires_grad=True)}, "value_cache wants a gradient"),
    ({"slots": torch.zeros(2, dtype=torch.int64)}, "slots"),
    ({"slots": torch.tensor([0, 3, 0])}, "slots must be below 3, found 3"),
    ({"offsets": torch.zeros(3)}, "offsets"),
    ({"offsets": torch.tensor([0, 4, 0])}, "offsets must be below 4, found 4"),
    ({"offsets": torch.tensor([0, -1, 0])}, "offsets must be at least 0, found -1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CACHES, ids=str)
def test_bad_caches_are_named_and_nothing_is_written(change, message):
    zeros = torch.zeros(3, dtype=torch.int64)
    key_cache, value_cache = caches(HEADS, 3, 4, torch.float32, "contiguous")
    arguments = {
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slots": zeros,
        "offsets": zeros,
    }
    with pytest.raises(ValueError, match=message):
        fk.rotary_kv_write(*GOOD[:4], **(arguments | change), **HEADS.options(GOOD[4]))
    assert (key_cache == 7.0).all()
    assert (value_cache == 7.0).all()


@pytest.mark.parametrize("num_tokens", [100])
def test_many_indices_are_checked_too(num_tokens):
    heads = Heads(1, 1, 4, 4)
    *inputs, weights = problem(heads, num_tokens)
    key_cache, value_cache = caches(heads, num_tokens, 1, torch.float32, "contiguous")
    slots, offsets = torch.arange(num_tokens), torch.zeros(num_tokens, dtype=torch.int64)
    rest = (key_cache, value_cache)
    slots[50], offsets[50] = -1, 77
    fk.rotary_kv_write(*inputs, *rest, slots, offsets, **heads.options(weights))
    assert (value_cache[50] == 7.0).all()
    offsets[51] = 1
    with pytest.raises(ValueError, match="offsets must be below 1, found 1"):
        fk.rotary_kv_write(*inputs, *rest, slots, offsets, **heads.options(weights))


def test_a_wanted_gradient_is_refused_where_there_is_none():
    *inputs, weights = problem(CASES[0], 1)
    zeros = torch.zeros(1, dtype=torch.int64)
    rest = caches(CASES[0], 1, 1, torch.float32, "contiguous")
    inputs[0].requires_grad_()
    with pytest.raises(ValueError, match="wants a gradient"):
        fk.rotary_kv_write(*inputs, *rest, zeros, zeros, **CASES[0].options(weights))


# --- transformers


def transposed(x):
    """[N, heads, head_dim] <-> [1, heads, N, head_dim]"""
    return x.transpose(0, 1).unsqueeze(0) if x.dim() == 3 else x.squeeze(0).transpose(0, 1)


@pytest.mark.parametrize("rotary_dim", [16, 8])
def test_is_the_rotation_of_llama_and_neox(rotary_dim):
    """GPT-NeoX turns the first part of a head as Llama turns all of it."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    module = llama if rotary_dim == 16 else neox
    heads = Heads(4, 2, 16, rotary_dim)
    qkv, cos, sin, positions, _ = problem(heads, 6)
    query, key, _ = ours(heads, qkv, cos, sin, positions, [None, None])
    cat = [torch.cat((table[positions],) * 2, -1).unsqueeze(0) for table in (cos, sin)]
    q, k, _ = qkv.view(6, 8, 16).split((4, 2, 2), 1)
    want = module.apply_rotary_pos_emb(transposed(q), transposed(k), *cat)
    for mine, theirs in zip((query, key), want, strict=True):
        torch.testing.assert_close(mine, transposed(theirs))


def test_is_the_rotation_of_gptj():
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    heads = Heads(3, 3, 16, 8, interleaved=True)
    qkv, cos, sin, positions, _ = problem(heads, 6)
    query, _, _ = ours(heads, qkv, cos, sin, positions, [None, None])
    x = qkv.view(6, 9, 16)[:, :3].unsqueeze(0)
    turned = gptj.apply_rotary_pos_emb(
        x[..., :8], sin[positions].unsqueeze(0), cos[positions].unsqueeze(0)
    )
    torch.testing.assert_close(query, torch.cat((turned, x[..., 8:]), -1).squeeze(0))


def test_is_the_norm_and_rotation_of_qwen3():
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    heads = Heads(4, 2, 16, 16, norms="qk")
    qkv, cos, sin, positions, weights = problem(heads, 6)
    config = qwen3.Qwen3Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    attention = qwen3.Qwen3Attention(config, 0)
    with torch.no_grad():
        attention.q_norm.weight.copy_(weights[0])
        attention.k_norm.weight.copy_(weights[1])
        q, k, _ = qkv.view(6, 8, 16).split((4, 2, 2), 1)
        cat = [torch.cat((table[positions],) * 2, -1).unsqueeze(0) for table in (cos, sin)]
        want = qwen3.apply_rotary_pos_emb(
            transposed(attention.q_norm(q)), transposed(attention.k_norm(k)), *cat
        )
    query, key, _ = ours(heads, qkv, cos, sin, positions, weights)
    for mine, theirs in zip((query, key), want, strict=True):
        torch.testing.assert_close(mine, transposed(theirs))


def test_the_offset_is_that_of_gemma3():
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    heads = Heads(2, 1, 16, 0, norms="q", weight_offset=1.0)
    qkv, cos, sin, positions, weights = problem(heads, 4)
    norm = gemma.Gemma3RMSNorm(16)
    with torch.no_grad():
        norm.weight.copy_(weights[0])
        want = norm(qkv.view(4, 4, 16)[:, :2])
    torch.testing.assert_close(ours(heads, qkv, cos, sin, positions, weights)[0], want)

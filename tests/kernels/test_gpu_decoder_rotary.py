"""rotary, rotary_kv_write and glu on a real GPU, at real sizes: right, repeatable, the same alone
as in a batch, without a wait, inside a graph."""

import pytest
import torch
from gpu_testing import assert_replays, assert_waits_for_nothing

import fuserl_kernels as fk

pytestmark = pytest.mark.gpu
covers = pytest.mark.covers
DEVICE = "cuda"
NUM_POSITIONS = 4096
MODELS = {  # num_heads, num_kv_heads, head_dim, rotary_dim, interleaved, norms
    "llama": (32, 8, 128, 128, False, False),
    "qwen3": (32, 8, 128, 128, False, True),
    "smollm": (9, 3, 64, 64, False, False),
    "gemma3": (4, 1, 256, 256, False, True),
    "neox": (32, 32, 80, 20, False, False),
    "gptj": (16, 16, 256, 64, True, False),
    "gpt2": (12, 12, 64, 0, False, False),
}


def problem(model, num_tokens, dtype):
    num_heads, num_kv_heads, head_dim, rotary_dim, interleaved, norms = MODELS[model]
    row = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(num_tokens, row, device=DEVICE).to(dtype)
    angle = torch.randn(NUM_POSITIONS, rotary_dim // 2, device=DEVICE) * 3
    weights = torch.randn(2, head_dim, device=DEVICE).to(dtype) if norms else (None, None)
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,), device=DEVICE)
    options = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "interleaved": interleaved,
        "q_norm_weight": weights[0],
        "k_norm_weight": weights[1],
    }
    return [qkv, angle.cos(), angle.sin(), positions], options


def with_gradients(function, leaves, seeds):
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(outputs, leaves, [g.to(outputs[0].dtype) for g in seeds])
    return [x.detach() for x in (*outputs, *gradients)]


def rotary_results(inputs, options, seeds, dtype=None):
    """Outputs and gradients, of the inputs in `dtype`."""
    names = [name for name in ("q_norm_weight", "k_norm_weight") if options[name] is not None]
    leaves = [inputs[0], *(options[name] for name in names)]

    def run(qkv, *weights):
        given = options | dict(zip(names, weights, strict=True))
        return fk.rotary(qkv, *inputs[1:], **given)

    return with_gradients(run, [x.to(dtype or x.dtype) for x in leaves], seeds)


def assert_close_to_truth(got, truth):
    for mine, exact in zip(got, truth, strict=True):
        assert not mine.isnan().any()
        # One rounding of each entry, and for sums the size of the largest.
        unit = torch.finfo(mine.dtype).eps
        error = (mine.double() - exact).abs()
        assert (error <= 0.51 * unit * exact.abs() + 4e-6 * exact.abs().max()).all()


@covers("rotary")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 4097])
def test_rotary_equals_the_definition_and_itself(model, dtype, num_tokens):
    inputs, options = problem(model, num_tokens, dtype)
    seeds = [
        torch.randn(num_tokens, options[name], MODELS[model][2], device=DEVICE).to(dtype)
        for name in ("num_heads", "num_kv_heads", "num_kv_heads")
    ]
    got = rotary_results(inputs, options, seeds)
    again = rotary_results(inputs, options, seeds)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    with fk.use_backend("reference"):
        assert_close_to_truth(got, rotary_results(inputs, options, seeds, torch.float64))


@covers("rotary_kv_write")
@pytest.mark.parametrize("model", MODELS)
def test_the_cache_gets_the_same_bits_in_any_batch(model):
    num_tokens = 2000
    inputs, options = problem(model, num_tokens, torch.bfloat16)
    query, key, value = fk.rotary(*inputs, **options)
    num_kv_heads, head_dim = key.shape[1:]
    room = torch.zeros(2, 64, num_kv_heads, 40, head_dim, device=DEVICE, dtype=torch.bfloat16)
    places = torch.randperm(64 * 40, device=DEVICE)[:num_tokens]
    slots, offsets = places // 40, places % 40
    slots = torch.where(torch.arange(num_tokens, device=DEVICE) % 5 == 0, -1, slots)
    written = slots >= 0
    wanted = room.clone()
    for cache, heads in zip(wanted, (key, value), strict=True):
        cache[slots[written], :, offsets[written]] = heads[written]
    found = room.clone()
    assert torch.equal(fk.rotary_kv_write(*inputs, *found, slots, offsets, **options), query)
    assert torch.equal(found, wanted)
    found = room.clone()
    for n in (0, 7, 1234):  # alone, as a decode step has it
        one = slice(n, n + 1)
        alone = [inputs[0][one], *inputs[1:3], inputs[3][one], *found, slots[one], offsets[one]]
        assert torch.equal(fk.rotary_kv_write(*alone, **options), query[one])
    for n in (7, 1234):
        assert torch.equal(found[0][slots[n], :, offsets[n]], key[n])
        assert torch.equal(found[1][slots[n], :, offsets[n]], value[n])


@covers("rotary_kv_write")
def test_outside_the_tables_and_caches_nothing_is_touched():
    inputs, options = problem("llama", 4, torch.bfloat16)
    inputs[3] = torch.tensor([0, -1, NUM_POSITIONS, 2**40], device=DEVICE)
    caches = torch.zeros(2, 2, 8, 3, 128, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.tensor([2, 2**40, 0, 1], device=DEVICE)
    offsets = torch.tensor([0, 0, 3, -1], device=DEVICE)
    query = fk.rotary_kv_write(*inputs, *caches, slots, offsets, **options)
    torch.cuda.synchronize()
    assert not query[0].isnan().any()
    assert query[1:].isnan().all()
    assert (caches == 0).all()


@covers("glu")
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 8960), (4097, 1111)], ids=str)
def test_glu_equals_the_definition_and_itself(activation, dtype, shape):
    gate_up = (3 * torch.randn(shape[0], 2 * shape[1], device=DEVICE)).to(dtype)
    seeds = [torch.randn(shape, device=DEVICE).to(dtype)]

    def run(x):
        return fk.glu(x, activation=activation)

    got, again = (with_gradients(run, [gate_up], seeds) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    with fk.use_backend("reference"):
        assert_close_to_truth(got, with_gradients(run, [gate_up.double()], seeds))
    assert torch.equal(run(gate_up[:1]), got[0][:1])


def calls():
    inputs, options = problem("qwen3", 64, torch.bfloat16)
    caches = torch.zeros(2, 64, 8, 32, 128, device=DEVICE, dtype=torch.bfloat16)
    slots = torch.arange(64, device=DEVICE)
    gate_up = torch.randn(64, 4096, device=DEVICE, dtype=torch.bfloat16)

    def write():
        query = fk.rotary_kv_write(*inputs, *caches, slots, slots % 32, **options)
        return query, caches

    def train():
        seeds = [torch.ones(64, n, 128, device=DEVICE) for n in (32, 8, 8)]
        return rotary_results(inputs, options, seeds)

    def activate():
        return with_gradients(fk.glu, [gate_up], [gate_up[:, :2048]])

    return (inputs[0], gate_up), {"rotary_kv_write": write, "rotary": train, "glu": activate}


OPS = ["rotary_kv_write", "rotary", "glu"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=covers(name)) for name in OPS])
def test_waits_for_nothing_also_inside_a_graph(name):
    tensors, functions = calls()

    def change():
        for tensor in tensors:
            tensor.mul_(0.9)

    assert_waits_for_nothing(functions[name])
    assert_replays(functions[name], change)

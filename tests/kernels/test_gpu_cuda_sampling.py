"""The sampler in CUDA C++ on a real GPU: beside the definition, beside Triton's to the bit where
that is promised, in a graph, on another stream, past 2^31 elements. test_cuda_sampling.py judges
the same code on a CPU."""

import pytest
import sampling_cases
import torch
from sampling_cases import DTYPES, KINDS, OPTIONS, rows

import fuserl_kernels as fk
from fuserl_kernels import backend, native
from fuserl_kernels.native_sampling import sample_cuda
from fuserl_kernels.sampling import FORWARD
from fuserl_kernels.triton_sampling import sample_triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.covers("native sample_tokens"),
    pytest.mark.skipif(
        native.why_absent("cuda") is not None,
        reason="CUDA C++ kernels are not built: FUSERL_BUILD=cuda python setup.py build_ext -i",
    ),
]
DEVICE = "cuda"


def keys(num_rows):
    return tuple(x.to(DEVICE) for x in sampling_cases.keys(num_rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 33, 4140, 50257])
def test_tokens_are_those_of_the_definition(kind, dtype, vocab_size):
    num_rows = num_decided = 0
    logits = rows(kind, 16, vocab_size).to(dtype).to(DEVICE)
    for seed, (temperature, *truncation) in enumerate(OPTIONS.values()):
        if temperature == 0:
            continue
        num_rows += 16
        num_decided += sampling_cases.assert_agree(
            sample_cuda, logits, temperature, *truncation, seed, *keys(16)
        )
    assert num_decided > 0.8 * num_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 2048, 50257, 128256])
@pytest.mark.parametrize("name", OPTIONS)
def test_beside_triton(dtype, vocab_size, name):
    """All bits where nothing is truncated; else a draw may differ where a rounding decides it."""
    logits = (2 * torch.randn(256, vocab_size, device=DEVICE)).to(dtype)
    arguments = (*OPTIONS[name], 7, *keys(256))
    ours, theirs = sample_cuda(logits, *arguments), sample_triton(logits, *arguments)
    if name in ("plain", "greedy"):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    same = ours[0] == theirs[0]
    assert same.float().mean() > 0.98
    assert torch.equal(ours[1][same], theirs[1][same])
    torch.testing.assert_close(ours[2][same], theirs[2][same], atol=1e-5, rtol=1e-5)
    assert torch.equal(
        ours[1], fk.token_logprobs(logits, ours[0], temperature=OPTIONS[name][0] or 1.0)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_alone_and_unaligned_has_the_same_bits(dtype, name):
    logits = (2 * torch.randn(64, 50257, device=DEVICE)).to(dtype)  # most rows are not aligned
    request_ids, positions = keys(64)
    together = sample_cuda(logits, *OPTIONS[name], 3, request_ids, positions)
    again = sample_cuda(logits, *OPTIONS[name], 3, request_ids, positions)
    for row in range(0, 64, 7):
        one = slice(row, row + 1)
        aligned = logits[one].clone()
        alone = sample_cuda(aligned, *OPTIONS[name], 3, request_ids[one], positions[one])
        for whole, repeated, single in zip(together, again, alone, strict=True):
            assert torch.equal(whole[one], single)
            assert torch.equal(whole, repeated)


@pytest.mark.parametrize("name", OPTIONS)
def test_broken_rows_are_reported_and_alone(name):
    logits = torch.randn(64, 9001, device=DEVICE)
    numbers = keys(64)
    clean = sample_cuda(logits, *OPTIONS[name], 1, *numbers)
    logits[3, 9000] = torch.nan
    logits[17, 0] = torch.inf
    logits[40] = -torch.inf
    token_ids, logprobs, truncated = sample_cuda(logits, *OPTIONS[name], 1, *numbers)
    broken = torch.zeros(64, dtype=torch.bool, device=DEVICE)
    broken[[3, 17, 40]] = True
    assert (token_ids[broken] == -1).all()
    assert logprobs[broken].isnan().all()
    assert truncated[broken].isnan().all()
    for a, b in zip((token_ids, logprobs, truncated), clean, strict=True):
        assert torch.equal(a[~broken], b[~broken])


@pytest.mark.parametrize("name", OPTIONS)
def test_in_a_graph_without_a_wait(name):
    logits = torch.randn(64, 32000, device=DEVICE, dtype=torch.bfloat16)
    request_ids, positions = keys(64)
    arguments = (*OPTIONS[name], 3, request_ids, positions)
    sample_cuda(logits, *arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_cuda(logits, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample_cuda(logits, *arguments)
    for step in range(3):
        positions.fill_(step)
        logits.neg_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(captured, sample_cuda(logits, *arguments), strict=True):
            assert torch.equal(a, b)


def test_it_runs_on_the_current_stream():
    """What a stream still has to write, a launch on that stream sees."""
    logits = torch.zeros(4, 32000, device=DEVICE)
    numbers = keys(4)
    sample_cuda(logits, *OPTIONS["top_p"], 1, *numbers)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        logits[:, 777] = 50.0
        token_ids, _, _ = sample_cuda(logits, *OPTIONS["top_p"], 1, *numbers)
    stream.synchronize()
    assert (token_ids == 777).all()


@pytest.mark.large
def test_past_two_to_the_31():
    logits = torch.zeros(17_000, 151_936, device=DEVICE, dtype=torch.bfloat16)
    logits[:, 1000] = 50.0
    token_ids, _, _ = sample_cuda(logits, *OPTIONS["top_p"], 0, *keys(17_000))
    assert (token_ids == 1000).all()


def test_any_strides_and_no_rows():
    logits = torch.randn(8, 3, 700, device=DEVICE)
    numbers = keys(8)
    want = sample_cuda(logits[:, 1].contiguous(), *OPTIONS["all"], 5, *numbers)
    columns = logits[:, 1].t().contiguous().t()
    for given in (logits[:, 1], columns):
        for a, b in zip(sample_cuda(given, *OPTIONS["all"], 5, *numbers), want, strict=True):
            assert torch.equal(a, b)
    assert sample_cuda(logits[:0, 1], *OPTIONS["all"], 5, *keys(0))[0].shape == (0,)


def test_too_many_columns_are_refused():
    logits = torch.zeros(1, 1, device=DEVICE).expand(1, 2**22 + 1)
    with pytest.raises(ValueError, match="logits may have 4194304 columns at most, not 4194305"):
        sample_cuda(logits, *OPTIONS["plain"], 0, *keys(1))


def test_the_native_backend_takes_it_and_auto_takes_triton():
    logits = torch.randn(4, 100, device=DEVICE)
    assert backend.select("sample_tokens", FORWARD, logits) is sample_triton
    with fk.use_backend("native"):
        assert backend.select("sample_tokens", FORWARD, logits) is FORWARD["native"]
        token_ids, logprobs, _ = fk.sample_tokens(logits, seed=1, top_p=0.9)
    assert ((token_ids >= 0) & (token_ids < 100)).all()
    assert torch.equal(logprobs, fk.token_logprobs(logits, token_ids))

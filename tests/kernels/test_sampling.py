"""sample_tokens: the bits, the distribution, truncation, determinism per request, broken rows."""

import math

import pytest
import torch
from kernel_testing import opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels import triton_runtime
from fuserl_kernels.reference.sampling import _draw, philox, uniform
from fuserl_kernels.sampling import FORWARD

BACKENDS = runnable(FORWARD)
# The interpreter takes up to 0.2 s a row, so it gets few; test_triton_sampling.py judges each.
COUNTED = [name for name in BACKENDS if name != "triton" or not triton_runtime.INTERPRETING]


def num_rows(backend, plenty):
    return plenty if backend in COUNTED else 20


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors published with Random123 for philox4x32-10."""
    state = torch.tensor(counter).unsqueeze(1).expand(4, 2).contiguous()
    assert philox(state, *key).tolist() == [[word, word] for word in words]


def test_uniform_bits_are_keyed_by_seed_request_and_position():
    requests = torch.tensor([0, 1, 2**32, 2**40 + 5])
    zero = torch.zeros(4, dtype=torch.long)
    u = uniform(1, requests, zero)
    assert u.dtype == torch.float64
    assert ((u >= 0) & (u < 1)).all()
    everything = torch.cat([u, uniform(2, requests, zero), uniform(2**32 + 1, requests, zero)])
    everything = torch.cat([everything, uniform(1, requests, zero + 1)])
    assert everything.unique().numel() == 16


def test_inverse_cdf_never_picks_what_has_no_mass():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, 5)
    last = 1 - 2.0**-53
    u = torch.tensor([0.0, 0.25, 0.9999, last], dtype=torch.float64)
    assert _draw(probabilities, u).tolist() == [1, 3, 3, 3]
    # Sums that round above and below one, at both ends.
    for scale in (0.1, 1 / 3, 1.0, 1 + 1e-7, 3.0, *torch.rand(50).tolist()):
        assert _draw(probabilities[:1] * scale, u[-1:]).tolist() == [3]
        assert _draw(probabilities[:1] * scale, u[:1]).tolist() == [1]


def chi_square(counts, probabilities):
    """Statistic over the possible entries, and its limit at p of about 1e-6."""
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    freedom = int(possible.sum()) - 1
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    z = 4.75  # Wilson and Hilferty's cube-root approximation of the quantile
    limit = freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic, limit


LOGITS = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0, 0.9, -torch.inf, 0.0])
TRUNCATIONS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 5, "top_p": 0.95, "min_p": 0.2},
}


def kept_set(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The rules one after another over Python lists."""
    p = torch.softmax(logits.double() / temperature, -1).tolist()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        order = order[:top_k]
    total, mass, kept = sum(p[i] for i in order), 0.0, []
    for i in order:
        if kept and mass >= top_p * total and top_p < 1:
            break
        kept.append(i)
        mass += p[i]
    kept = [i for i in kept if p[i] >= min_p * p[order[0]]]
    truncated = torch.zeros(len(p), dtype=torch.float64)
    truncated[kept] = torch.tensor([p[i] for i in kept], dtype=torch.float64)
    return truncated / truncated.sum()


@pytest.mark.parametrize("backend", COUNTED)
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_distribution(backend, name):
    num_draws = 20_000
    with fk.use_backend(backend):
        token_ids, logprobs, truncated_logprobs = fk.sample_tokens(
            LOGITS.expand(num_draws, -1), seed=7, **TRUNCATIONS[name]
        )
    probabilities = kept_set(LOGITS, **TRUNCATIONS[name])
    counts = torch.bincount(token_ids, minlength=len(LOGITS)).double()
    assert (counts[probabilities == 0] == 0).all()
    statistic, limit = chi_square(counts, probabilities)
    assert statistic < limit
    # The same test rejects a neighbouring distribution, so it can fail.
    biased = kept_set(LOGITS, **(TRUNCATIONS[name] | {"temperature": 0.8}))
    statistic, limit = chi_square(counts, biased)
    assert statistic > limit
    torch.testing.assert_close(
        truncated_logprobs.double(), probabilities[token_ids].log(), atol=2e-6, rtol=1e-6
    )
    temperature = TRUNCATIONS[name].get("temperature", 1.0)
    expected = torch.log_softmax(LOGITS / temperature, -1)[token_ids]
    torch.testing.assert_close(logprobs, expected, atol=2e-6, rtol=1e-6)


def test_positions_and_requests_are_equally_random():
    rows = LOGITS.expand(20_000, -1)
    zero, count = torch.zeros(20_000, dtype=torch.long), torch.arange(20_000)
    probabilities = kept_set(LOGITS)
    for requests, positions in [(zero, count), (count, zero)]:
        token_ids, _, _ = fk.sample_tokens(rows, seed=3, request_ids=requests, positions=positions)
        statistic, limit = chi_square(
            torch.bincount(token_ids, minlength=len(LOGITS)).double(), probabilities
        )
        assert statistic < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}]
)
def test_a_request_gets_the_same_tokens_in_any_batch(backend, options):
    logits = torch.randn(9, 5003) * 3
    requests, positions = torch.arange(100, 109), torch.arange(9) * 7
    order = torch.randperm(9)
    with fk.use_backend(backend):
        whole = fk.sample_tokens(
            logits, seed=5, request_ids=requests, positions=positions, **options
        )
        shuffled = fk.sample_tokens(
            logits[order],
            seed=5,
            request_ids=requests[order],
            positions=positions[order],
            **options,
        )
        for a, b in zip(whole, shuffled, strict=True):
            assert torch.equal(a[order], b)
        for row in range(9):
            part = slice(row, row + 1)
            alone = fk.sample_tokens(
                logits[part],
                seed=5,
                request_ids=requests[part],
                positions=positions[part],
                **options,
            )
            for a, b in zip(whole, alone, strict=True):
                assert torch.equal(a[part], b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_token_logprobs_to_the_bit(backend, temperature):
    logits = torch.randn(20, 1280) * 3
    with fk.use_backend(backend):
        token_ids, logprobs, _ = fk.sample_tokens(logits, seed=1, temperature=temperature, top_k=50)
        assert torch.equal(logprobs, fk.token_logprobs(logits, token_ids, temperature=temperature))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(7, 1, 0), (0, 0.8, 0), (0, 1, 0.05), (9, 0.6, 0.1)]
)
def test_kept_set_is_that_of_transformers(backend, top_k, top_p, min_p):
    """Without ties the kept sets agree: ours read off the sampled tokens and their mass."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(1, 40) * 2
    scores = logits
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = process.MinPLogitsWarper(min_p)(None, scores)
    with fk.use_backend(backend):
        token_ids, _, truncated = fk.sample_tokens(
            logits.expand(num_rows(backend, 5000), -1),
            seed=0,
            top_k=top_k,
            top_p=float(top_p),
            min_p=float(min_p),
        )
    kept = scores[0] > -torch.inf
    assert kept[token_ids].all()
    torch.testing.assert_close(
        truncated, torch.log_softmax(scores[0], -1)[token_ids], atol=2e-6, rtol=1e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend):
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]]).expand(num_rows(backend, 500), -1)
    with fk.use_backend(backend):
        by_k, _, truncated = fk.sample_tokens(logits, seed=0, top_k=2)
        by_p, _, _ = fk.sample_tokens(logits, seed=0, top_p=0.4)
        greedy, _, _ = fk.sample_tokens(logits, seed=0, temperature=0.0)
    assert by_k.unique().tolist() == [1, 2]
    assert by_p.unique().tolist() == [1, 2]
    assert greedy.unique().tolist() == [1]
    torch.testing.assert_close(truncated, torch.full_like(truncated, -math.log(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy(backend):
    logits = torch.randn(4, 30) * 3
    with fk.use_backend(backend):
        one = fk.sample_tokens(logits, temperature=0.0, seed=0)
        two = fk.sample_tokens(logits, temperature=0.0, seed=99)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one[0], logits.argmax(-1))
    torch.testing.assert_close(one[1], torch.log_softmax(logits, -1).amax(-1))
    assert (one[2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}],
)
def test_broken_rows_are_reported_and_touch_no_other(backend, options):
    logits = torch.randn(5, 6)
    with fk.use_backend(backend):
        clean = fk.sample_tokens(logits, seed=1, **options)
        logits[0, 2] = torch.nan
        logits[1] = -torch.inf
        logits[2, 3] = torch.inf
        token_ids, logprobs, truncated = fk.sample_tokens(logits, seed=1, **options)
    assert token_ids[:3].tolist() == [-1, -1, -1]
    assert logprobs[:3].isnan().all()
    assert truncated[:3].isnan().all()
    for a, b in zip((token_ids, logprobs, truncated), clean, strict=True):
        assert torch.equal(a[3:], b[3:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges(backend, dtype):
    with fk.use_backend(backend):
        lone = fk.sample_tokens(torch.zeros(3, 1, dtype=dtype), seed=0)
        assert lone[0].tolist() == [0, 0, 0]
        assert (lone[1] == 0).all()
        empty = fk.sample_tokens(torch.zeros(0, 5, dtype=dtype), seed=0, top_k=2, top_p=0.5)
        assert empty[0].shape == (0,)
        huge = torch.tensor([[-torch.inf, 1e30, -1e30, -torch.inf]]).to(dtype)
        for top_k in (0, 1, 4, 100):
            assert fk.sample_tokens(huge, seed=0, top_k=top_k)[0].tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    requests, positions = torch.arange(3), torch.zeros(3, dtype=torch.long)
    with fk.use_backend(backend):
        opcheck("sample_tokens", torch.randn(3, 9), 0.8, 4, 0.9, 0.05, 3, requests, positions)
        opcheck("sample_tokens", torch.randn(3, 9), 0.0, 0, 1.0, 0.0, 3, requests, positions)


def test_bad_arguments_are_named():
    logits = torch.zeros(2, 5)
    for message, options in {
        "temperature must be .*-1": {"temperature": -1.0},
        "top_k must be": {"top_k": -1},
        "top_k must be a whole number": {"top_k": 2.5},
        "top_p must be .*above 0": {"top_p": 0.0},
        "top_p must be in": {"top_p": 1.1},
        "min_p must be in": {"min_p": 2.0},
        "seed must be in": {"seed": -1},
        "request_ids must have shape": {"request_ids": torch.arange(3)},
        "positions must be an integer": {"positions": torch.zeros(2)},
    }.items():
        with pytest.raises(ValueError, match=message):
            fk.sample_tokens(logits, **({"seed": 0} | options))
    with pytest.raises(ValueError, match=r"logits must have shape \[B, V\]"):
        fk.sample_tokens(torch.zeros(5), seed=0)

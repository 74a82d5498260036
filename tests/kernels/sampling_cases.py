"""What samplers are judged by: hostile rows, options, and the definition in float64."""

import math

import torch

from fuserl_kernels.reference.sampling import _draw, _top_k, _top_p, uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# temperature, top_k, top_p, min_p
OPTIONS = {
    "plain": (0.8, 0, 1.0, 0.0),
    "greedy": (0.0, 0, 1.0, 0.0),
    "top_k": (0.8, 40, 1.0, 0.0),
    "top_p": (0.8, 0, 0.9, 0.0),
    "min_p": (0.8, 0, 1.0, 0.05),
    "all": (0.8, 400, 0.9, 0.01),
}


def options_at(vocab_size):
    """(temperature, top_k, top_p, min_p) of each kind, some of which depend on the vocabulary."""
    some, half = max(1, vocab_size // 3), vocab_size // 2 + 1
    truncations = [
        (0, 1.0, 0.0),
        (some, 1.0, 0.0),
        (0, 0.8123, 0.0),
        (0, 1.0, 0.0531),
        (half, 0.6517, 0.0),
        (half, 0.9071, 0.0217),
        (vocab_size, 0.99991, 0.0),
        (1, 0.5, 0.0),
        (0, 1e-9, 0.0),
        (0, 1.0, 1.0),
    ]
    return [((0.8, 1.0, 1.7)[i % 3], *options) for i, options in enumerate(truncations)]


def keys(num_rows):
    """Request ids of either sign and size, and positions up to 2^32."""
    request_ids = torch.randint(-(2**62), 2**62, (num_rows,))
    return request_ids, torch.randint(0, 2**32, (num_rows,))


def definition(x, temperature, top_k, top_p, min_p, u):
    """Tokens and the log of their share of the kept mass, in the dtype of x."""
    x = (x - x.amax(-1, keepdim=True)) / temperature
    if 0 < top_k < x.shape[1]:
        x = torch.where(_top_k(x, top_k), x, -torch.inf)
    if top_p < 1:
        x = torch.where(_top_p(x, top_p), x, -torch.inf)
    if min_p > 0:
        x = torch.where(x >= math.log(min_p), x, -torch.inf)
    token_ids = _draw(torch.softmax(x, -1), u)
    truncated = torch.log_softmax(x, -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return token_ids, truncated


def assert_agree(
    sample, logits, temperature, top_k, top_p, min_p, seed, request_ids, positions, margin=2e-6
):
    """A sampler and the definition in float64, where rounding decides nothing: where shifting each
    boundary by this share changes no token and no kept set.
    Returns how many rows those are."""
    options = temperature, top_k, top_p, min_p, seed, request_ids, positions
    token_ids, logprobs, truncated = sample(logits, *options)
    u = uniform(seed, request_ids, positions)
    below, above = (
        definition(
            logits.double(),
            temperature,
            top_k,
            top_p * shift if top_p < 1 else 1.0,
            min(1.0, min_p * shift),
            u * shift,
        )
        for shift in (1 - margin, 1 + margin)
    )
    decided = (below[0] == above[0]) & (below[1] == above[1])
    assert torch.equal(token_ids[decided], above[0][decided])
    torch.testing.assert_close(truncated[decided].double(), above[1][decided], atol=3e-6, rtol=1e-6)
    x = logits.double() / temperature
    want = torch.log_softmax(x, -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), want, atol=3e-6, rtol=1e-6)
    return int(decided.sum())


def rows(kind, num_rows, vocab_size):
    shape = (num_rows, vocab_size)
    noise = torch.randn(shape)
    return {
        "random": noise * torch.linspace(0.1, 8, num_rows).unsqueeze(1),
        "few values": torch.randint(-3, 3, shape).float(),
        "all equal": torch.full(shape, -7.25),
        "signed zeros": torch.where(noise < 0, -0.0, 0.0),
        "cluster": torch.where(noise < 1, torch.rand(shape) * 1e-5, noise),
        "clusters in clusters": torch.where(noise < 0, 1e-6 * torch.rand(shape), 1e-3 * noise),
        "mostly -inf": torch.where(noise < 1, -torch.inf, noise * 2).index_fill(
            1, torch.tensor([vocab_size // 2]), 1.0
        ),
        "rising": torch.linspace(-30, 30, vocab_size).expand(shape),
        "one far above": (noise * 0.1).index_fill(1, torch.tensor([vocab_size // 3]), 9.0),
        "far from zero": noise + 1e4,
    }[kind]


KINDS = [
    "random",
    "few values",
    "all equal",
    "signed zeros",
    "cluster",
    "clusters in clusters",
    "mostly -inf",
    "rising",
    "one far above",
    "far from zero",
]

"""decode_attention: the definition, the public function and what all implementations share."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Problem, problem
from kernel_testing import assert_error_rule, opcheck, runnable

import fuserl_kernels as fk
from fuserl_kernels.decode_attention import FORWARD

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
OPTIONS = {"plain": {}, "window": {"window": 37}, "softcap": {"window": 310, "softcap": 5.0}}
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow)")


def dense(case: Problem, row: int, window=None, softcap=None) -> torch.Tensor:
    """One row by the formula, with its keys laid side by side: [num_heads, head_dim]."""
    num_heads, head_dim = case.query.shape[1:]
    slot, length = int(case.slots[row]), int(case.lengths[row])
    keys, values = (c[slot, :, :length] for c in (case.key_cache, case.value_cache))
    if case.prefix_ids is not None and case.prefix_ids[row] >= 0:
        which = int(case.prefix_ids[row])
        shared = int(case.prefix_lengths[which])
        keys = torch.cat([case.prefix_keys[which, :, :shared], keys], 1)
        values = torch.cat([case.prefix_values[which, :, :shared], values], 1)
    if window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    if keys.shape[1] == 0:
        return torch.zeros_like(case.query[row])
    group = num_heads // keys.shape[0]
    keys, values = (x.repeat_interleave(group, 0) for x in (keys, values))
    scores = (keys @ case.query[row, :, :, None]).squeeze(-1) * head_dim**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return (torch.softmax(scores, -1)[:, None] @ values).squeeze(1)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("prefix", [None, (3, 290)])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2)])
def test_the_definition_is_softmax_attention(heads, prefix, options):
    case = problem(heads=heads, head_dim=16, prefix=prefix, dtype=torch.float64)
    with fk.use_backend("reference"):
        got = case.run(**options)
    assert got.dtype == torch.float64
    for row in range(len(case.lengths)):
        torch.testing.assert_close(got[row], dense(case, row, **options), atol=1e-12, rtol=0)


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize("dtype", DTYPES)
def test_errs_no_more_than_torch(backend, dtype):
    """Torch's own attention, in the same dtype, on a row whose cache is full."""
    case = problem(heads=(6, 2), head_dim=48, capacity=257, dtype=dtype, amount=2.0)
    with fk.use_backend(backend):
        got = case.run()
    truth = case.to(torch.float64).definition()
    last = len(case.lengths) - 1
    slot = case.slots[last]
    peer = F.scaled_dot_product_attention(
        case.query[last].view(2, 3, 48), case.key_cache[slot], case.value_cache[slot]
    )
    assert got.dtype == dtype
    assert_error_rule(got[last], peer.view(6, 48), truth[last], TOLERANCE[dtype])
    torch.testing.assert_close(got.double(), truth, atol=2 * TOLERANCE[dtype], rtol=4e-3)


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize("amount", [1e-20, 1e-3, 30.0, 1e4])
def test_scores_of_any_size(backend, amount):
    """Scores near 0, and so far apart that one key takes it all."""
    case = problem(head_dim=32, capacity=270, prefix=(2, 40), amount=amount)
    with fk.use_backend(backend):
        got = case.run()
    truth = case.to(torch.float64).definition()
    torch.testing.assert_close(got.double(), truth, atol=2e-4 * amount, rtol=1e-4)


@pytest.mark.parametrize("backend", runnable(FORWARD))
def test_no_row_no_token_and_rows_that_are_off(backend):
    case = problem(num_rows=4, prefix=(2, 20), capacity=40)
    with fk.use_backend(backend):
        empty = case.rows(torch.tensor([], dtype=torch.int64)).run()
        assert empty.shape == (0, 4, 64)
        whole = case.run()
        off = dataclasses.replace(case, slots=torch.where(torch.arange(4) == 1, -3, case.slots))
        got = off.run()
        nothing = dataclasses.replace(case, prefix_ids=torch.full((4,), -1))
        assert (nothing.run()[0] == 0).all()
        # A row that is off may have any numbers.
        far = dataclasses.replace(
            off, prefix_ids=off.prefix_ids.index_fill(0, torch.tensor([1]), 99)
        )
        assert torch.equal(far.run(), got)
    assert (got[1] == 0).all()
    assert torch.equal(got[[0, 2, 3]], whole[[0, 2, 3]])
    assert whole[0].abs().max() > 0, "a prefix and no token of its own"
    with fk.use_backend(backend):
        no_slot = dataclasses.replace(
            case,
            key_cache=case.key_cache[:0],
            value_cache=case.value_cache[:0],
            slots=torch.full((4,), -1),
        )
        assert (no_slot.run() == 0).all(), "every row is off"


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize("layout", ["tokens first", "every other token", "part of a wider head"])
def test_strides(backend, layout):
    case = problem(prefix=(2, 30), capacity=70, head_dim=24)
    layouts = {
        "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other token": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        "part of a wider head": lambda x: torch.cat([x, x * math.nan], 3)[..., :24],
    }
    names = ("key_cache", "value_cache", "prefix_keys", "prefix_values")
    other = dataclasses.replace(
        case,
        **{name: layouts[layout](getattr(case, name)) for name in names},
        query=case.query.repeat_interleave(2, 2)[..., ::2],
        lengths=torch.stack([case.lengths, case.lengths], 1)[:, 0],
        slots=torch.stack([case.slots, case.slots], 1)[:, 0],
    )
    with fk.use_backend(backend):
        assert torch.equal(other.run(), case.run())
        sliced = dataclasses.replace(
            case, query=torch.cat([case.query, case.query], 1)[:, : case.query.shape[1]]
        )
        assert torch.equal(sliced.run(), case.run())


@pytest.mark.parametrize("backend", runnable(FORWARD))
def test_slots_default_to_the_row_number(backend):
    case = problem()
    plain = dataclasses.replace(case, slots=None, key_cache=case.key_cache[case.slots])
    plain = dataclasses.replace(plain, value_cache=case.value_cache[case.slots])
    with fk.use_backend(backend):
        assert torch.equal(plain.run(), case.run())


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize("prefix", [None, (2, 30)])
def test_opcheck_and_compile(backend, prefix):
    case = problem(prefix=prefix, capacity=40, head_dim=16)
    positional = (case.query, case.key_cache, case.value_cache, case.lengths)
    with fk.use_backend(backend):
        opcheck("decode_attention", *positional, *case.options().values(), 0.25, 7, 3.0)
        compiled = torch.compile(lambda: case.run(window=7), fullgraph=True, backend="eager")
        assert torch.equal(compiled(), case.run(window=7))


def test_no_gradient():
    case = problem()
    leaf = dataclasses.replace(case, key_cache=case.key_cache.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="decode_attention has no gradient"):
        leaf.run()
    with torch.no_grad():
        assert torch.equal(leaf.run(), case.run())


BAD = {
    "query": {"query": torch.zeros(5, 4, 257)},
    "key_cache must be a torch.float32": {"key_cache": torch.zeros(7, 2, 300, 64).half()},
    "key_cache must have shape": {"key_cache": torch.zeros(7, 2, 300, 65)},
    "key_cache must have a last stride": {"key_cache": torch.zeros(7, 2, 300, 128)[..., ::2]},
    "key_cache must have a number of heads": {
        "key_cache": torch.zeros(7, 3, 300, 64),
        "value_cache": torch.zeros(7, 3, 300, 64),
    },
    "value_cache must have shape": {"value_cache": torch.zeros(7, 2, 299, 64)},
    "lengths must be an int64": {"lengths": torch.ones(5, dtype=torch.int32)},
    "lengths must have shape": {"lengths": torch.ones(6).long()},
    "slots must have shape": {"slots": torch.ones(6).long()},
    "key_cache must have a slot for each": {"slots": None, "query": torch.zeros(9, 4, 64)},
    "prefix_ids must be given": {"prefix_ids": None},
    "prefix_keys must be given": {"prefix_keys": None},
    "prefix_keys must have the 2 heads": {
        "prefix_keys": torch.zeros(3, 1, 20, 64),
        "prefix_values": torch.zeros(3, 1, 20, 64),
    },
    "prefix_keys must hold a prefix": {
        "prefix_keys": torch.zeros(0, 2, 20, 64),
        "prefix_values": torch.zeros(0, 2, 20, 64),
    },
    "prefix_lengths must have shape": {"prefix_lengths": torch.zeros(4).long()},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_tensors_are_named(message):
    case = dataclasses.replace(problem(prefix=(3, 20)), **BAD[message])
    if case.query.shape[0] == 9:
        case = dataclasses.replace(case, lengths=torch.ones(9).long())
    with pytest.raises(ValueError, match=message):
        case.run()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", math.inf),
        ("scale", "large"),
        ("window", 0),
        ("window", 2.5),
        ("softcap", 0.0),
        ("softcap", -1.0),
        ("softcap", "none"),
    ],
)
def test_bad_options_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        problem().run(**{name: value})


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize(
    ("name", "value"),
    [("lengths", 301), ("lengths", -1), ("slots", 7), ("prefix_ids", 3), ("prefix_lengths", 21)],
)
def test_what_does_not_exist(backend, name, value):
    """Named on the CPU; a kernel that may not look at data on the host gives NaN in that row."""
    case = problem(prefix=(3, 20))
    numbers = getattr(case, name).clone()
    numbers[int(case.prefix_ids[1]) if name == "prefix_lengths" else 1] = value
    case = dataclasses.replace(case, **{name: numbers})
    with fk.use_backend(backend):
        if backend == "triton":
            got = case.run()
            assert got[1].isnan().all()
            assert not got[case.prefix_ids != case.prefix_ids[1]].isnan().any()
        else:
            with pytest.raises(ValueError, match=f"{name} must be at most"):
                case.run()


def causal_mask(num_tokens: int, window: int | None) -> torch.Tensor:
    """[1, 1, 1, T] of the last token: 0 where it may look, -inf elsewhere."""
    mask = torch.zeros(1, 1, 1, num_tokens)
    if window is not None:
        mask[..., : max(0, num_tokens - window)] = -torch.inf
    return mask


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("window", [None, 6])
def test_the_last_token_of_transformers_attention(backend, family, window):
    """Their module over a whole sequence, with its mask; ours between its projections."""
    if family == "llama":
        from transformers import LlamaConfig as Config
        from transformers.models.llama.modeling_llama import LlamaAttention as Attention
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    else:
        from transformers import Gemma2Config as Config
        from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention as Attention
        from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb
    num_tokens, head_dim = 19, 16
    config = Config(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=head_dim,
        num_hidden_layers=2, attn_implementation="eager",
    )  # fmt: skip
    module = Attention(config, layer_idx=1).eval()
    x = torch.randn(1, num_tokens, 48)
    angles = torch.randn(1, num_tokens, head_dim)
    cos, sin = angles.cos(), angles.sin()
    with torch.no_grad(), fk.use_backend(backend):
        past = _Past(module, x, cos, sin, apply_rotary_pos_emb)
        last = cos[:, -1:], sin[:, -1:]
        mask = causal_mask(num_tokens, window)
        want, _ = module(x[:, -1:], last, mask, past_key_values=past)
        query = module.q_proj(x[:, -1:]).view(1, 1, 6, head_dim).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *last)
        split = 11  # of the tokens as a prompt that is stored once
        got = fk.decode_attention(
            query[:, :, 0],
            past.keys[:, :, split:],
            past.values[:, :, split:],
            torch.tensor([num_tokens - split]),
            prefix_keys=past.keys[:, :, :split],
            prefix_values=past.values[:, :, :split],
            prefix_ids=torch.tensor([0]),
            prefix_lengths=torch.tensor([split]),
            scale=module.scaling,
            window=window,
            softcap=config.attn_logit_softcapping if family == "gemma2" else None,
        )
        torch.testing.assert_close(module.o_proj(got.view(1, 1, -1)), want, atol=1e-6, rtol=1e-5)


class _Past:
    """A cache of transformers' kind that holds all tokens already."""

    def __init__(self, module, x, cos, sin, rotate) -> None:
        shape = (1, x.shape[1], 2, module.head_dim)
        keys = module.k_proj(x).view(shape).transpose(1, 2)
        self.keys, _ = rotate(keys, keys, cos, sin)
        self.values = module.v_proj(x).view(shape).transpose(1, 2)

    def update(self, keys, values, layer_idx, *_):
        torch.testing.assert_close(keys, self.keys[:, :, -1:])
        return self.keys, self.values

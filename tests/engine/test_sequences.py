"""Joined rows, the one-step shift and the masks, against loops over Python lists."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuserl.data.batching import pad_rows
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.sequences import (
    completion_logprobs,
    completion_states,
    completion_values,
    join,
    last_values,
    mask_of_lengths,
)

IDS = st.integers(0, 39)
PAIRS = st.lists(
    st.tuples(st.lists(IDS, min_size=1, max_size=6), st.lists(IDS, max_size=6)),
    min_size=1,
    max_size=5,
)
Pairs = list[tuple[list[int], list[int]]]


@given(pairs=PAIRS, pad=IDS)
def test_join_puts_each_completion_behind_its_prompt(pairs: Pairs, pad: int) -> None:
    prompts, prompt_lengths = pad_rows([p for p, _ in pairs], pad_id=pad)
    completions, lengths = pad_rows([c for _, c in pairs], pad_id=pad)
    rows = [p + c for p, c in pairs]
    width = max(map(len, rows))
    joined = join(prompts, prompt_lengths, completions, lengths)
    assert joined.tolist() == [row + [0] * (width - len(row)) for row in rows]


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), width=st.integers(0, 12))
def test_masks_count_the_lengths(lengths: list[int], width: int) -> None:
    mask = mask_of_lengths(torch.tensor(lengths), width)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[slot < length for slot in range(width)] for length in lengths]


@given(pairs=PAIRS, extra=st.integers(0, 3))
def test_slot_t_is_the_state_before_completion_token_t(pairs: Pairs, extra: int) -> None:
    """States are their own positions here, so that each slot says where it came from."""
    prompt_lengths = torch.tensor([len(p) for p, _ in pairs])
    rows = [p + c for p, c in pairs]
    longest = max(map(len, rows))
    positions = torch.arange(longest).expand(len(rows), longest)
    states = torch.stack([positions, 100 * torch.arange(len(rows))[:, None] + positions], dim=-1)
    width = max(len(c) for _, c in pairs) + extra
    found = completion_states(states, prompt_lengths, width)
    assert found.shape == (len(rows), width, 2)
    for i, (prompt, _) in enumerate(pairs):
        for slot in range(width):
            position = min(len(prompt) - 1 + slot, longest - 1)
            assert found[i, slot].tolist() == [position, 100 * i + position]


@settings(max_examples=20, deadline=None)
@given(pairs=PAIRS.filter(lambda pairs: any(c for _, c in pairs)), pad=IDS)
def test_logprobs_and_values_equal_one_row_at_a_time(
    pairs: Pairs,
    pad: int,
    make_model: Callable[..., LanguageModel],
    make_scalar_model: Callable[..., ScalarModel],
) -> None:
    model, critic = make_model(seed=1), make_scalar_model(seed=2)
    prompts, prompt_lengths = pad_rows([p for p, _ in pairs], pad_id=pad)
    completions, lengths = pad_rows([c for _, c in pairs], pad_id=pad)
    token_ids = join(prompts, prompt_lengths, completions, lengths)
    mask = mask_of_lengths(lengths, completions.shape[1])
    with torch.no_grad():
        logprobs = completion_logprobs(model, token_ids, prompt_lengths, completions, mask, 0.7)
        values = completion_values(critic, token_ids, prompt_lengths, completions.shape[1])
        scores = last_values(critic, token_ids, prompt_lengths + lengths)
        assert logprobs.shape == values.shape == mask.shape
        assert (logprobs[~mask] == 0).all()
        for i, (prompt, completion) in enumerate(pairs):
            row = torch.tensor([prompt + completion])
            own_values = critic.values(row)[0]
            assert scores[i].item() == pytest.approx(own_values[-1].item(), abs=1e-4)
            logits = (model(row) @ model.output_weight.T)[0] / 0.7
            for t, token in enumerate(completion):
                before = len(prompt) - 1 + t
                expected = logits[before].log_softmax(-1)[token].item()
                assert logprobs[i, t].item() == pytest.approx(expected, abs=1e-4)
                assert values[i, t].item() == pytest.approx(own_values[before].item(), abs=1e-4)

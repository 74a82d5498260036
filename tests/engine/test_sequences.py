"""Packed sequences, the one-step shift and the masks, against loops over Python lists."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import run_one

from fuserl.batch import RolloutBatch
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.sequences import (
    Sequences,
    completion_logprobs,
    completion_loss,
    completion_values,
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


def of(pairs: Pairs) -> Sequences:
    return Sequences.of([p for p, _ in pairs], [c for _, c in pairs])


@given(pairs=PAIRS)
def test_each_completion_stands_behind_its_prompt(pairs: Pairs) -> None:
    sequences = of(pairs)
    assert sequences.token_ids.tolist() == [token for p, c in pairs for token in (*p, *c)]
    assert sequences.packing.lengths == tuple(len(p) + len(c) for p, c in pairs)
    assert sequences.completion_ids.tolist() == [token for _, c in pairs for token in c]
    expected = [(row, slot) for row, (_, c) in enumerate(pairs) for slot in range(len(c))]
    found = zip(sequences.rows.tolist(), sequences.slots.tolist(), strict=True)
    assert list(found) == expected


@given(pairs=PAIRS.filter(lambda pairs: all(c for _, c in pairs)), pad=IDS)
def test_a_batch_gives_the_same_as_its_lists(pairs: Pairs, pad: int) -> None:
    """Whatever its padding holds."""
    lengths = [torch.tensor([len(pair[side]) for pair in pairs]) for side in (0, 1)]
    padded = [
        torch.tensor([[*pair[side], *[pad] * (7 - len(pair[side]))] for pair in pairs])
        for side in (0, 1)
    ]
    batch = RolloutBatch(
        prompts=padded[0],
        prompt_lengths=lengths[0],
        completions=padded[1],
        completion_lengths=lengths[1],
        has_eos=torch.ones(len(pairs), dtype=torch.bool),
        loss_mask=mask_of_lengths(lengths[1], 7),
        logprobs=torch.zeros(len(pairs), 7),
        truncated_logprobs=torch.zeros(len(pairs), 7),
    )
    found, expected = Sequences.of_batch(batch), of(pairs)
    for name in ("token_ids", "prompt_lengths", "rows", "slots"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.packing.lengths == expected.packing.lengths
    assert torch.equal(found.by_token(batch.completions), found.completion_ids)
    there_and_back = found.by_slot(found.completion_ids, 7)
    assert torch.equal(there_and_back, torch.where(batch.loss_mask, batch.completions, 0))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), width=st.integers(0, 12))
def test_masks_count_the_lengths(lengths: list[int], width: int) -> None:
    mask = mask_of_lengths(torch.tensor(lengths), width)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[slot < length for slot in range(width)] for length in lengths]


@given(pairs=PAIRS, extra=st.integers(0, 3))
def test_slot_t_is_the_state_before_completion_token_t(pairs: Pairs, extra: int) -> None:
    """States are their own rows and positions here, so that each slot says where it came from."""
    sequences = of(pairs)
    states = 100 * sequences.packing.rows + sequences.packing.positions
    width = max(len(c) for _, c in pairs) + extra
    found = sequences.states_by_slot(states, width)
    assert found.shape == (len(pairs), width)
    for i, (prompt, completion) in enumerate(pairs):
        last = len(prompt) + len(completion) - 1
        for slot in range(width):
            assert found[i, slot] == 100 * i + min(len(prompt) - 1 + slot, last)
    assert torch.equal(states[sequences.before], sequences.by_token(found))


@settings(max_examples=20, deadline=None)
@given(pairs=PAIRS.filter(lambda pairs: any(c for _, c in pairs)))
def test_logprobs_and_values_equal_one_row_at_a_time(
    pairs: Pairs,
    make_model: Callable[..., LanguageModel],
    make_scalar_model: Callable[..., ScalarModel],
) -> None:
    model, critic = make_model(seed=1), make_scalar_model(seed=2)
    sequences, width = of(pairs), max(len(c) for _, c in pairs)
    with torch.no_grad():
        logprobs = sequences.by_slot(completion_logprobs(model, sequences, 0.7), width)
        values = completion_values(critic, sequences, width)
        scores = last_values(critic, sequences)
        assert logprobs.shape == values.shape
        for i, (prompt, completion) in enumerate(pairs):
            row = prompt + completion
            own_values = run_one(critic, row)
            assert scores[i].item() == pytest.approx(own_values[-1].item(), abs=1e-4)
            logits = model.logits(run_one(model, row)) / 0.7
            for t, token in enumerate(completion):
                before = len(prompt) - 1 + t
                expected = logits[before].log_softmax(-1)[token].item()
                assert logprobs[i, t].item() == pytest.approx(expected, abs=1e-4)
                assert values[i, t].item() == pytest.approx(own_values[before].item(), abs=1e-4)
            assert (logprobs[i, len(completion) :] == 0).all()


@pytest.mark.parametrize("tie", [True, False])
def test_the_loss_is_the_mean_of_the_logprobs_with_equal_gradients(
    make_model: Callable[..., LanguageModel], tie: bool
) -> None:
    model = make_model(tie_embeddings=tie, head_bias=True, final_softcap=3.0)
    sequences = of([([3, 5], [7, 9, 11]), ([4], [8]), ([6, 7, 8], [9, 2])])
    found = []
    for loss in (
        completion_loss(model, sequences),
        -completion_logprobs(model, sequences).mean(),
    ):
        (2 * loss).backward()  # as a microbatch is weighed
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    assert len(found[0]) == 1 + len(list(model.parameters()))
    torch.testing.assert_close(*found)
    with torch.no_grad():
        torch.testing.assert_close(completion_loss(model, sequences), found[0][0])

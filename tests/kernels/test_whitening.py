"""masked_whiten: biased and unbiased, kept means, masks, degenerate counts."""

import pytest
import torch
from kernel_testing import assert_error_rule, opcheck, ragged_mask, runnable, widest

import fuserl_kernels as fk
from fuserl_kernels.whitening import FORWARD

BACKENDS = runnable(FORWARD)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("shift_mean", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_equals_the_plain_formula(backend, unbiased, shift_mean, wide):
    dtype = widest(backend) if wide else torch.float32
    x, mask = torch.randn(7, 9, dtype=dtype) * 3 + 5, ragged_mask(7, 9, holes=True)

    def plain(kept):
        white = (kept - kept.mean()) * torch.rsqrt(kept.var(unbiased=unbiased) + 1e-8)
        return white if shift_mean else white + kept.mean()

    with fk.use_backend(backend):
        got = fk.masked_whiten(
            torch.where(mask, x, torch.nan), mask, shift_mean=shift_mean, unbiased=unbiased
        )
    assert got.dtype == dtype
    assert (got[~mask] == 0).all()
    assert_error_rule(got[mask], plain(x[mask]), plain(x[mask].double()), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_parts_whitened_together(backend, unbiased):
    """Microbatches or ranks that share their moments get the numbers of the whole batch, also
    where the parts lie far apart and one of them is empty."""
    x, mask = torch.randn(7, 9) * 3 + 5, ragged_mask(7, 9, holes=True)
    x[4:] += 100
    mask[2:4] = False
    parts = [slice(0, 2), slice(2, 4), slice(4, 7)]
    with fk.use_backend(backend):
        expected = fk.masked_whiten(x, mask, unbiased=unbiased)
        moments = torch.stack([fk.masked_moments(x[part], mask[part]) for part in parts])
        got = [
            fk.masked_whiten(x[part], mask[part], unbiased=unbiased, moments=moments)
            for part in parts
        ]
        whole = fk.masked_moments(x, mask)
        again = fk.masked_whiten(x, mask, unbiased=unbiased, moments=whole)
    torch.testing.assert_close(torch.cat(got), expected)
    torch.testing.assert_close(again, expected)
    kept = x[mask].double()
    squares = (kept - kept.mean()).square().sum()
    truth = torch.stack([torch.tensor(float(len(kept)), dtype=torch.float64), kept.mean(), squares])
    torch.testing.assert_close(whole, truth, atol=0.0, rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    x, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    with fk.use_backend(backend):
        torch.testing.assert_close(fk.masked_whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))
        root = 2**-0.5
        torch.testing.assert_close(
            fk.masked_whiten(x, mask, unbiased=True), torch.tensor([[-root, root, 0.0]])
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_one_entry_equal_entries_and_none(backend, unbiased):
    x = torch.full((2, 3), 4.0)
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[1, 1] = True
    with fk.use_backend(backend):
        assert (fk.masked_whiten(x, one, unbiased=unbiased) == 0).all()
        kept = fk.masked_whiten(x, one, shift_mean=False, unbiased=unbiased)
        assert kept[1, 1].item() == 4.0
        assert (fk.masked_whiten(x, x == 4, unbiased=unbiased) == 0).all()
        assert (fk.masked_whiten(x, x == 0, unbiased=unbiased) == 0).all()
        assert fk.masked_whiten(x[:0], one[:0], unbiased=unbiased).shape == (0, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    with fk.use_backend(backend):
        x, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.5
        moments = torch.tensor([[4.0, 0.5, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
        opcheck("masked_moments", x, mask)
        opcheck("masked_whiten", x, mask, None, True, False)
        opcheck("masked_whiten", x, mask, moments, False, True)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="mask must have shape"):
        fk.masked_whiten(torch.zeros(2, 3), torch.ones(2, dtype=torch.bool))
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="moments must be float64"):
        fk.masked_whiten(x, x == 0, moments=torch.zeros(3))
    for shape in ((), (2, 2), (0, 3), (1, 1, 3)):
        with pytest.raises(ValueError, match="moments must be float64"):
            fk.masked_whiten(x, x == 0, moments=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(ValueError, match="x must be a floating-point"):
        fk.masked_whiten(torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))

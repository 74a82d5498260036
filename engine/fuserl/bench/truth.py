"""What a right answer is, and how far an answer is from it."""

import math
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]

MAX_DEVIATIONS = 6.0  # of a mean from that of a fair draw, in standard deviations


@dataclass(frozen=True, slots=True)
class Error:
    """value: largest absolute difference of the outputs from float64.
    gradient: largest relative difference (2-norm) of a gradient at the checked rows; 0 without."""

    value: float
    gradient: float

    def within(self, bound: "Error") -> bool:
        """False for NaN too."""
        return self.value <= bound.value and self.gradient <= bound.gradient


@dataclass(frozen=True, slots=True)
class Truth:
    """outputs: float64, as a provider returns them. gradients: for each input that gets one, the
    indices [R] of the rows that are checked and their float64 values [R, ...]."""

    outputs: Tensors
    gradients: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def value_error(self, outputs: Tensors) -> float:
        return max(
            finite_norm(mine, mine.detach().double() - exact)
            for mine, exact in zip(outputs, self.outputs, strict=True)
        )

    def gradient_error(self, gradients: Tensors) -> float:
        slopes = [
            finite_norm(mine, (mine[rows].double() - exact) / exact.norm(), 2)
            for mine, (rows, exact) in zip(gradients, self.gradients, strict=True)
        ]
        return max(slopes, default=0.0)


@dataclass(frozen=True, slots=True)
class SamplerTruth:
    """What can be known of sampled tokens: a sampler has no single right answer.

    logits: float64 [N, V], divided by the temperature. lse: their log-sum-exp [N]. kept_mass: the
    probability of the set that top_p keeps [N]; edge: of the last token in it [N].
    """

    logits: torch.Tensor
    lse: torch.Tensor
    kept_mass: torch.Tensor
    edge: torch.Tensor
    top_p: float

    def value_error(self, outputs: Tensors) -> float:
        """outputs: token_ids, logprobs and perhaps truncated logprobs, [N] each.

        The largest error of a log-probability at its token, or the probability by which a token
        lies beyond the set that top_p keeps. Rounding may move the edge of that set by one token.
        Infinite for what is no token, for a token of probability 0, and for tokens that together
        are far likelier or rarer than those of a fair draw.
        """
        token_ids, *logprobs = (x.detach() for x in outputs)
        if token_ids.dtype != torch.int64:
            return math.inf
        if not bool(((token_ids >= 0) & (token_ids < self.logits.shape[1])).all()):
            return math.inf
        chosen = self.logits.gather(-1, token_ids[:, None]).squeeze(-1) - self.lse
        above = self._mass_above(token_ids)
        if self._deviations(above, chosen.exp()) > MAX_DEVIATIONS:
            return math.inf
        beyond = (above - self.top_p - self.edge).clamp(min=0).max()
        errors = [float(beyond), finite_norm(logprobs[0], logprobs[0].double() - chosen)]
        for truncated in logprobs[1:]:
            difference = (truncated.double() - chosen + self.kept_mass.log()).abs()
            excess = (difference - self.edge / self.kept_mass).clamp(min=0)
            errors.append(finite_norm(truncated, excess))
        return max(errors)

    def gradient_error(self, gradients: Tensors) -> float:
        assert not gradients
        return 0.0

    def _mass_above(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Probability of what is likelier than each token, or as likely with a lower index [N]."""
        columns = torch.arange(self.logits.shape[1], device=self.logits.device)
        masses = []
        for row, lse, token in zip(self.logits, self.lse, token_ids, strict=True):
            likelier = (row > row[token]) | ((row == row[token]) & (columns < token))
            masses.append(torch.where(likelier, (row - lse).exp(), 0).sum())
        return torch.stack(masses)

    def _deviations(self, above: torch.Tensor, chosen: torch.Tensor) -> float:
        """Of the mean place of the tokens within the kept mass, uniform for a fair draw."""
        place = (above + chosen / 2) / self.kept_mass
        return abs(float(place.mean()) - 0.5) * math.sqrt(12 * place.numel())


def finite_norm(answer: torch.Tensor, difference: torch.Tensor, order: float = math.inf) -> float:
    """A norm of the difference; infinite if the answer or the difference is not finite."""
    if not bool(torch.isfinite(answer.detach().sum(dtype=torch.float32))):
        return math.inf
    size = float(torch.linalg.vector_norm(difference, order))
    return size if math.isfinite(size) else math.inf

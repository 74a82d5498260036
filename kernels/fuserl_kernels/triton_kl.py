"""Device functions of the KL estimates, for rewards and losses. Formulas: reference/rewards.py."""

from fuserl_kernels.triton_helpers import _expm1
from fuserl_kernels.triton_runtime import tl, triton


@triton.jit
def _kl(d, kl_clip, ESTIMATOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """The estimate of KL from d = logprob - ref_logprob; kl_clip is infinite for none."""
    if ESTIMATOR == "k1":
        kl = d
    elif ESTIMATOR == "k2":
        kl = 0.5 * d * d
    elif ESTIMATOR == "k3":
        kl = _expm1(-d) + d
    else:
        kl = tl.abs(d)
    return _clamp(kl, kl_clip)


@triton.jit
def _clamp(x, bound):  # type: ignore[no-untyped-def]
    """x held within +-bound by selects: a NaN stays one."""
    return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def _kl_slope(d, kl_clip, ESTIMATOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Derivative of _kl to d. That of k1 is 1 even where d is no number, so that a zero gradient
    from a masked token stays zero."""
    if ESTIMATOR == "k1":
        slope = tl.where(d > 0, 1.0, 1.0)
    elif ESTIMATOR == "k2":
        slope = d
    elif ESTIMATOR == "k3":
        slope = -_expm1(-d)
    else:
        slope = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    return tl.where(tl.abs(_kl(d, float("inf"), ESTIMATOR)) > kl_clip, 0.0, slope)

"""Gated linear units, activation(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer").

With the normal distribution Phi and its density phi, and the logistic function s:

    silu       x s(x)                slope  s(x) + x s(x) s(-x)
    gelu       x Phi(x)              slope  Phi(x) + x phi(x)
    gelu_tanh  x s(u), u = 2 sqrt(2 / pi) (x + 0.044715 x^3), that is x (1 + tanh(u / 2)) / 2
    relu       max(x, 0)             slope  0 at 0
"""

import math

import torch

from fuserl_kernels.reference.sequences import compute_dtype

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activation_and_slope(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation at x, and its derivative there."""
    if activation == "relu":
        return x.relu(), (x > 0).to(x.dtype)
    if activation == "gelu":
        share = 0.5 * torch.erfc(-x / math.sqrt(2))
        # Beyond 100 the density is 0; held there, its square stays finite.
        held = x.clamp(-100, 100)
        return x * share, share + held * torch.exp(-0.5 * held.square()) / math.sqrt(2 * math.pi)
    u, change = x, torch.ones_like(x)
    if activation == "gelu_tanh":
        held = x.clamp(-100, 100)
        twice = 2 * math.sqrt(2 / math.pi)
        u = twice * held * (1 + 0.044715 * held.square())
        change = twice * (1 + 3 * 0.044715 * held.square())
    share = torch.sigmoid(u)
    return x * share, share + x * share * torch.sigmoid(-u) * change


def glu_fwd(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[N, 2 I] -> [N, I]"""
    gate, up = gate_up.to(compute_dtype(gate_up)).chunk(2, -1)
    return (activation_and_slope(gate, activation)[0] * up).to(gate_up.dtype)


def glu_bwd(gate_up: torch.Tensor, grad: torch.Tensor, activation: str) -> torch.Tensor:
    """[N, 2 I], [N, I] -> [N, 2 I]"""
    dtype = compute_dtype(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, -1)
    value, slope = activation_and_slope(gate, activation)
    grad = grad.to(dtype)
    return torch.cat((grad * up * slope, grad * value), -1).to(gate_up.dtype)

"""The package as a whole: every op compiles without a graph break, imports point inward."""

import ast
import sys
from pathlib import Path

import pytest
import torch
from kernel_testing import ragged_mask

import fuserl_kernels as fk

MASK = ragged_mask(3, 4)
HIDDEN, WEIGHT = torch.randn(3, 4, 5), torch.randn(7, 5)
IDS = torch.randint(0, 7, (3, 4))
OLD, ADVANTAGES, VALUES = torch.randn(3, 3, 4)
CU_SEQLENS = torch.tensor([0, 4, 8, 12])

CALLS = {
    "fixed_linear": lambda h, w: fk.fixed_linear(h.flatten(0, 1), w, w[:, 0]).square().sum(),
    "linear_token_logprobs": lambda h, w: fk.linear_token_logprobs(
        h, w, IDS, temperature=0.7, softcap=9.0, loss_mask=MASK
    ).sum(),
    "linear_policy_loss": lambda h, w: fk.linear_policy_loss(h, w, IDS, OLD, ADVANTAGES, MASK)[0],
    "policy_loss": lambda h, w: fk.policy_loss(
        h.sum(-1), OLD, ADVANTAGES[:, 0], MASK, denominator=5, aggregation="sequence_mean"
    )[0],
    "policy_loss, packed": lambda h, w: fk.policy_loss(
        h.sum(-1).flatten(),
        OLD.flatten(),
        ADVANTAGES[:, 0],
        MASK.flatten(),
        cu_seqlens=CU_SEQLENS,
        ratio_level="sequence_mean",
    )[0],
    "value_loss": lambda h, w: fk.value_loss(h.sum(-1), VALUES, OLD, MASK)[0],
    "ppo_loss": lambda h, w: (
        sum(fk.ppo_loss(h.sum(-1), OLD, ADVANTAGES, h.mean(-1), VALUES, OLD, MASK)[1].values()) * 0
        + fk.ppo_loss(h.sum(-1), OLD, ADVANTAGES, h.mean(-1), VALUES, OLD, MASK)[0]
    ),
    "pairwise_loss": lambda h, w: fk.pairwise_loss(h.sum((1, 2)), h[:, 0, 0], margin=0.1)[0],
    "kl_penalty": lambda h, w: fk.kl_penalty(h, HIDDEN + 1, "k3").sum(),
    "rewards_to_advantages": lambda h, w: (
        h.sum()
        + sum(
            x.sum()
            for x in fk.rewards_to_advantages(
                h[:, 0, 0],
                OLD,
                OLD + 1,
                VALUES,
                MASK,
                kl_coef=0.1,
                gamma=1.0,
                gae_lambda=0.9,
                whiten=True,
                score_slot="after",
                max_length=4,
            )
        )
    ),
    "gae": lambda h, w: (
        h.sum()
        + fk.gae(OLD, VALUES, MASK)[0].sum()
        + fk.discounted_returns(OLD.flatten(), MASK.flatten(), cu_seqlens=CU_SEQLENS).sum()
    ),
    "shape_rewards": lambda h, w: (
        h.sum()
        + fk.shape_rewards(h[:, 0, 0], OLD, OLD, MASK, kl_coef=0.1)[0].sum()
        + fk.masked_whiten(h[..., 0], MASK).sum()
    ),
    "sample_tokens": lambda h, w: h.sum() + fk.sample_tokens(h[0], seed=1, top_k=3)[1].sum(),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole(name):
    leaves = [HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()]
    expected = CALLS[name](*leaves)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected)
    gradients = [
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        for loss in (compiled, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_sizes_and_numbers_that_change_between_calls_compile():
    def function(x, token_ids, old, mask, temperature, clip_range, kl_coef, denominator):
        logprobs = fk.token_logprobs(x * 2, token_ids, temperature=temperature)
        return fk.policy_loss(
            logprobs, old, old, mask, clip_range=clip_range, kl_coef=kl_coef, ref_logprobs=old,
            denominator=denominator,
        )[0]  # fmt: skip

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in range(3, 7):
        leaf = torch.randn(n, 9, requires_grad=True)
        arguments = (torch.randint(0, 9, (n,)), torch.randn(n), torch.ones(n, dtype=torch.bool))
        numbers = (0.5 + 0.1 * n, 0.1 + 0.01 * n, 0.02 * n, 2.5 * n)
        losses = [f(leaf, *arguments, *numbers) for f in (compiled, function)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, leaf) for loss in losses))


def test_the_package_imports_torch_itself_and_the_standard_library():
    for path in Path(fk.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                root = name.split(".")[0]
                assert root in ("torch", "fuserl_kernels") or root in sys.stdlib_module_names
                if path.parent.name == "reference" and root == "fuserl_kernels":
                    assert name.startswith("fuserl_kernels.reference")

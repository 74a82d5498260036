"""The table of benchmarked ops: a new op joins by one entry.

A provider is named `fuserl-<implementation>` or after its library.
"""

import torch

import fuserl_kernels as fk
from fuserl.bench import (
    attention,
    glu,
    norms,
    rivals,
    rotary,
    sampling,
    token_rivals,
)
from fuserl.bench.case import Case, linear_cost, rows_cost
from fuserl.bench.op import BASELINE, Op, Provider, Sizes
from fuserl.bench.problem import (
    CLIP_RANGE,
    KL_COEF,
    PolicyBatch,
    logprobs_problem,
    policy_problem,
)
from fuserl.bench.rivals import Function, Unavailable, with_loss
from fuserl.bench.token_ops import TOKEN_OPS
from fuserl.bench.truth import Tensors
from fuserl_kernels import backend
from fuserl_kernels.registration import tables


def _token_logprobs(case: Case) -> Function:
    def run(logits: torch.Tensor, token_ids: torch.Tensor) -> Tensors:
        if case.with_entropy:
            return fk.token_logprobs(
                logits, token_ids, return_entropy=True, inplace_grad=case.inplace_grad
            )
        return (fk.token_logprobs(logits, token_ids, inplace_grad=case.inplace_grad),)

    return run


def _linear_token_logprobs(case: Case) -> Function:
    def run(hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor) -> Tensors:
        if case.with_entropy:
            return fk.linear_token_logprobs(hidden, weight, token_ids, return_entropy=True)
        return (fk.linear_token_logprobs(hidden, weight, token_ids),)

    return run


def _linear_policy_loss(case: Case) -> Function:
    def run(hidden: torch.Tensor, weight: torch.Tensor, batch: PolicyBatch) -> Tensors:
        loss, _ = fk.linear_policy_loss(
            hidden.view(*batch.token_ids.shape, -1),
            weight,
            batch.token_ids,
            batch.logprobs,
            batch.advantages,
            batch.loss_mask,
            ref_logprobs=batch.ref_logprobs,
            clip_range=CLIP_RANGE,
            kl_coef=KL_COEF,
            entropy_coef=batch.entropy_coef,
        )
        return (loss,)

    return run


def _sample_tokens(case: Case) -> Function:
    return lambda logits, _: fk.sample_tokens(
        logits, temperature=case.temperature, top_p=case.top_p, seed=0
    )


_LINEAR = {
    "cpu": Sizes(num_rows=512, vocab_size=32000, hidden_size=1024),
    "cuda": Sizes(num_rows=8192, vocab_size=128256, hidden_size=4096),
}
_LAYER = {
    "cpu": Sizes(num_rows=2048, hidden_size=2048),
    "cuda": Sizes(num_rows=8192, hidden_size=4096),
}
OPS: dict[str, Op] = {
    "token_logprobs": Op(
        problem=logprobs_problem,
        cost=rows_cost,
        ours=_token_logprobs,
        rivals={
            BASELINE: rivals.torch_rows,
            "torch-compile": rivals.torch_compile_rows,
            "trl": rivals.trl_rows,
            "trl-triton": rivals.trl_triton_rows,
        },
        defaults={
            "cpu": Sizes(num_rows=512, vocab_size=128256),
            "cuda": Sizes(num_rows=8192, vocab_size=128256),
        },
        options={"with_entropy": False, "inplace_grad": False},
    ),
    "linear_token_logprobs": Op(
        problem=logprobs_problem,
        cost=linear_cost,
        ours=_linear_token_logprobs,
        rivals={
            BASELINE: rivals.torch_linear,
            "torch-compile": rivals.torch_compile_linear,
            "torch-chunked": rivals.torch_chunked_linear,
            "trl": rivals.trl_linear,
            "liger": rivals.liger_linear,
            "cut-cross-entropy": rivals.cce_linear,
        },
        defaults=_LINEAR,
        options={"with_entropy": False},
    ),
    "linear_policy_loss": Op(
        problem=policy_problem,
        cost=linear_cost,
        ours=_linear_policy_loss,
        rivals={
            BASELINE: with_loss(rivals.torch_linear),
            "torch-compile": rivals.torch_compile_loss,
            "torch-chunked": with_loss(rivals.torch_chunked_linear),
            "trl": with_loss(rivals.trl_linear),
            "liger": rivals.liger_loss,
            "cut-cross-entropy": with_loss(rivals.cce_linear),
        },
        defaults=_LINEAR,
        options={"with_entropy": False},
        passes=("forward_backward",),
    ),
    **TOKEN_OPS,
    "sample_tokens": Op(
        problem=sampling.sampling_problem,
        cost=rows_cost,  # one read of the logits
        ours=_sample_tokens,
        rivals={
            BASELINE: sampling.torch_sampler,
            "transformers": sampling.transformers_sampler,
            "exp-sum": sampling.exp_sum,
        },
        defaults={
            "cpu": Sizes(num_rows=64, vocab_size=128256),
            "cuda": Sizes(num_rows=256, vocab_size=128256),
        },
        passes=("forward",),
        has_gradient=False,
        options={"temperature": 0.8, "top_p": 0.95},
    ),
    "rms_norm": Op(
        problem=norms.norm_problem,
        cost=norms.norm_cost,
        ours=norms.ours,
        rivals={
            BASELINE: norms.torch_norm,
            "torch-compile": token_rivals.compiled(norms.torch_norm),
            "transformers": norms.transformers_rms,
            "liger": norms.liger_norm,
        },
        defaults=_LAYER,
        options={"with_residual": False},
    ),
    "layer_norm": Op(
        problem=norms.norm_problem,
        cost=norms.norm_cost,
        ours=norms.ours,
        rivals={
            BASELINE: norms.torch_norm,
            "torch-compile": token_rivals.compiled(norms.torch_norm),
            "liger": norms.liger_norm,
        },
        defaults=_LAYER,
        options={"with_residual": False},
    ),
    "rotary": Op(
        problem=rotary.rotary_problem,
        cost=rotary.rotary_cost,
        ours=rotary.rotary_ours,
        rivals={
            BASELINE: rotary.rotary_eager,
            "torch-compile": token_rivals.compiled(rotary.rotary_eager),
            "transformers": rotary.rotary_transformers,
        },
        defaults={
            "cpu": Sizes(num_rows=512, hidden_size=1024),
            "cuda": Sizes(num_rows=8192, hidden_size=4096),
        },
    ),
    "rotary_kv_write": Op(
        problem=rotary.rotary_kv_write_problem,
        cost=rotary.rotary_cost,
        ours=rotary.rotary_kv_write_ours,
        rivals={
            BASELINE: rotary.rotary_kv_write_eager,
            "torch-compile": token_rivals.compiled(rotary.rotary_kv_write_eager),
        },
        defaults={
            "cpu": Sizes(num_rows=64, hidden_size=1024),
            "cuda": Sizes(num_rows=256, hidden_size=4096),
        },
        passes=("forward",),
        has_gradient=False,
    ),
    "decode_attention": Op(
        problem=attention.attention_problem,
        cost=attention.attention_cost,
        ours=attention.ours,
        rivals={
            BASELINE: attention.sdpa,
            "torch-eager": attention.eager,
            "torch-compile": token_rivals.compiled(attention.sdpa),
        },
        defaults={
            "cpu": Sizes(num_rows=32, num_heads=8, num_kv_heads=2, head_dim=64, num_tokens=512),
            "cuda": Sizes(
                num_rows=256, num_heads=32, num_kv_heads=8, head_dim=128, num_tokens=2048
            ),
        },
        passes=("forward",),
        has_gradient=False,
    ),
    "glu": Op(
        problem=glu.glu_problem,
        cost=glu.glu_cost,
        ours=glu.glu_ours,
        rivals={
            BASELINE: glu.glu_eager,
            "torch-compile": token_rivals.compiled(glu.glu_eager),
            "transformers": glu.glu_transformers,
            "liger": glu.glu_liger,
        },
        defaults={
            "cpu": Sizes(num_rows=512, hidden_size=1536),
            "cuda": Sizes(num_rows=8192, hidden_size=14336),
        },
    ),
}


def find_op(name: str) -> Op:
    if name not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
    return OPS[name]


def _ours(op: str, implementation: str) -> Provider:
    def make(case: Case) -> Function:
        if implementation == "triton" and case.device != "cuda":
            raise Unavailable("it needs a CUDA device; Triton's interpreter is not timed")
        with fk.use_backend(implementation):
            try:
                sample = torch.empty(0, dtype=case.torch_dtype, device=case.device)
                backend.select(op, tables()[op], sample)
            except RuntimeError as error:
                raise Unavailable(str(error)) from None
        return OPS[op].ours(case)

    return Provider(f"fuserl-{implementation}", make, implementation)


def default_provider(case: Case) -> str:
    """The one of ours that runs where nobody chooses: what a user of the op gets."""
    table = tables()[case.op]
    sample = torch.empty(0, dtype=case.torch_dtype, device=case.device)
    with fk.use_backend("auto"):
        chosen = backend.select(case.op, table, sample)
    (name,) = (name for name, implementation in table.items() if implementation is chosen)
    return f"fuserl-{name}"


def providers(op: str, names: str = "all") -> list[Provider]:
    """Those named, separated by commas; plain torch is always among them, for the ratios.

    Raises ValueError for a name that is not in the table.
    """
    known = [_ours(op, implementation) for implementation in tables()[op]]
    known += [Provider(name, make) for name, make in find_op(op).rivals.items()]
    wanted = [name.strip() for name in names.split(",")]
    unknown = sorted(set(wanted) - {"all", *(provider.name for provider in known)})
    if unknown:
        raise ValueError(
            f"providers must be all or some of {', '.join(p.name for p in known)}, "
            f"got {', '.join(unknown)}"
        )
    return [p for p in known if "all" in wanted or p.name in (*wanted, BASELINE)]

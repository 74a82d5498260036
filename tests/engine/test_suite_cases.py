"""What the GPU suite times: each case once, the most wanted first, with sizes that its op has."""

import dataclasses

from suite_parts import proof

import fuserl_kernels as fk
from fuserl.bench.ops import OPS
from fuserl.bench.suite.cases import (
    DECODING,
    PARTS,
    TRAINING,
    VOCAB_SIZES,
    needs,
    op_cases,
    rollout_cases,
    timed_providers,
)
from fuserl.bench.suite.proof import Proof


def test_every_op_is_timed_before_any_is_timed_again() -> None:
    cases = op_cases()
    assert len({case.title for case in cases}) == len(cases)
    assert {case.op for case in cases[: len(OPS)]} == set(OPS)
    assert cases[0].title == "token_logprobs forward N=8192 V=128256 bf16 cuda"
    assert {case.vocab_size for case in cases} == {0, *VOCAB_SIZES}
    assert {case.cuda_graph for case in cases} == {False, True}
    assert all(needs(case) == (case.op,) for case in cases)


def test_cases_have_the_sizes_of_their_op() -> None:
    for case in op_cases():
        op = OPS[case.op]
        sizes = dataclasses.asdict(op.defaults["cuda"])
        assert {name for name, size in sizes.items() if size} == {
            name for name in sizes if getattr(case, name)
        }, case.title
        assert case.pass_name in (*op.passes, "forward")
        assert op.has_gradient or not case.backward
        for name in ("with_entropy", "inplace_grad", "with_metrics", "with_residual"):
            assert not getattr(case, name) or name in op.options, case.title


def test_the_definition_itself_is_not_timed() -> None:
    for op in OPS:
        chosen = timed_providers(op, proof())
        assert {provider.backend for provider in chosen if provider.is_ours} >= {"triton"}
        assert not any(provider.backend == "reference" for provider in chosen)
        assert any(not provider.is_ours for provider in chosen)


def test_cuda_is_timed_where_tests_of_its_own_are_green() -> None:
    def backends(found: Proof) -> set[str]:
        chosen = timed_providers("sample_tokens", found)
        return {provider.backend for provider in chosen if provider.backend is not None}

    green = proof("sample_tokens", "native sample_tokens")
    assert backends(green) == {"triton", "native"}
    assert backends(proof("sample_tokens")) == {"triton"}
    failed = proof("sample_tokens", red={"native sample_tokens": "1 of 1 tests failed"})
    assert backends(failed) == {"triton"}


def test_rollouts_begin_with_steps_of_each_shape_and_meet_the_rivals_early() -> None:
    titles = [case.title for case in rollout_cases()]
    assert len(set(titles)) == len(titles)
    assert titles[0] == "decode steps, Qwen3-0.6B, 256 rows, bf16 cuda"
    assert titles[3] == "rollout, Qwen3-0.6B, uniform lengths, bf16 cuda"
    assert sum(title.startswith("decode steps") for title in titles) == 12
    assert sum(title.startswith("rollout") for title in titles) == 4


def test_what_a_number_rests_on_are_ops_that_exist() -> None:
    for part in PARTS.values():
        for case in part.cases():
            assert set(needs(case)) <= {*fk.__all__, "rollout"}
    assert set(DECODING) | set(TRAINING) <= {*fk.__all__, "rollout"}

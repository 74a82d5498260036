"""The benchmark harness: truths, refusals, floors, meters, and what is written."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fuserl_kernels as fk
from fuserl import cli
from fuserl.bench import run, timing
from fuserl.bench.case import Case, Cost, linear_cost, rows_cost
from fuserl.bench.checking import Call, bound_for, measure_error
from fuserl.bench.memory import peak_extra_bytes, why_not_measured
from fuserl.bench.op import BASELINE, Provider
from fuserl.bench.ops import OPS, default_provider, providers
from fuserl.bench.output import WrongAnswer
from fuserl.bench.problem import Problem
from fuserl.bench.report import CaseReport, Result
from fuserl.bench.rivals import Unavailable, load, torch_rows
from fuserl.bench.run import cases_of, run_bench, run_case
from fuserl.bench.timing import Ceilings, interleave, measure_ceilings, quartiles
from fuserl.bench.truth import Error, Tensors, Truth
from fuserl.config import BenchConfig
from fuserl_kernels import native
from fuserl_kernels.registration import tables

ROOT = Path(__file__).parents[2]
CEILINGS = Ceilings(1e9, 1e9, "fp32")
REFERENCE = "fuserl-reference"


TINY = {"num_rows": 12, "vocab_size": 37, "hidden_size": 5, "num_sequences": 7, "num_slots": 9}
TINY |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "num_tokens": 11}


def tiny_sizes(op: str) -> dict[str, int]:
    defaults = dataclasses.asdict(OPS[op].defaults["cpu"])
    return {name: TINY[name] for name, default in defaults.items() if default}


def tiny(op: str, pass_name: str | None = None, **changes: Any) -> Case:
    """The op's last pass, which is forward and backward where it has a gradient."""
    options = {"device": "cpu", "dtype": "fp32", **tiny_sizes(op), **changes}
    return Case(op=op, pass_name=pass_name or OPS[op].passes[-1], **options)


def widened(problem: Problem) -> Problem:
    """With float64 inputs, but for those inside a batch."""
    inputs = [
        x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in problem.inputs
    ]
    for x in inputs[: problem.num_grads]:
        x.requires_grad_()
    return dataclasses.replace(problem, inputs=tuple(inputs))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces entries of the row op's table by other providers."""

    def replace(**changes: Any) -> None:
        entry = dataclasses.replace(OPS["token_logprobs"], **changes)
        monkeypatch.setitem(OPS, "token_logprobs", entry)

    return replace


@pytest.fixture(autouse=True)
def _known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: CEILINGS)


def with_offset(offset: float) -> Callable[[Case], Callable[..., Tensors]]:
    """A provider whose log-probabilities are all wrong by `offset`."""

    def make(case: Case) -> Callable[..., Tensors]:
        right = torch_rows(case)
        return lambda *inputs: (right(*inputs)[0] + offset,)

    return make


# --- the truth and the check


OPTIONS = [
    (op, {option: True} if option else {})
    for op in OPS
    for option in (None, "with_entropy", "with_metrics")
    if option is None or option in OPS[op].options
]


@pytest.mark.parametrize(("op", "options"), OPTIONS)
def test_the_truth_is_what_autograd_gives_in_float64(op: str, options: dict[str, bool]) -> None:
    problem = widened(OPS[op].problem(tiny(op, **options)))
    eager = OPS[op].rivals[BASELINE](problem.case)
    outputs, gradients = Call(problem, eager, None).run()
    error = measure_error(problem, outputs, gradients)
    assert error.value < 1e-12
    assert error.gradient < 1e-12
    assert len(gradients) == problem.num_grads
    assert problem.case.backward == (problem.num_grads > 0)


@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].has_gradient])
def test_every_gradient_row_that_is_checked_is_told_apart(op: str) -> None:
    problem = OPS[op].problem(tiny(op))
    assert isinstance(problem.truth, Truth)
    call = Call(problem, OPS[op].rivals[BASELINE](problem.case), None)
    outputs, gradients = call.run()
    for i, (rows, _) in enumerate(problem.truth.gradients):
        spoiled = [gradient.clone() for gradient in gradients]
        spoiled[i][rows[-1]] *= 1.5
        error = measure_error(problem, outputs, tuple(spoiled))
        assert not error.within(bound_for("fp32", False, None))
        spoiled[i][rows[-1]] = torch.nan
        assert measure_error(problem, outputs, tuple(spoiled)).gradient == float("inf")


@pytest.mark.parametrize(("op", "options"), OPTIONS)
def test_every_output_is_told_apart(op: str, options: dict[str, bool]) -> None:
    problem = OPS[op].problem(tiny(op, **options))
    call = Call(problem, OPS[op].rivals[BASELINE](problem.case), None)
    outputs, gradients = call.run()
    for i in range(len(outputs)):
        for wrong in (outputs[i] + 0.01, outputs[i] * torch.nan):
            spoiled = (*outputs[:i], wrong, *outputs[i + 1 :])
            error = measure_error(problem, spoiled, gradients)
            assert not error.within(bound_for("fp32", False, None))


def test_the_ratios_of_the_policy_problem_keep_off_the_clip() -> None:
    problem = OPS["linear_policy_loss"].problem(tiny("linear_policy_loss", num_rows=512))
    hidden, weight, batch = problem.inputs
    logp = F.linear(hidden, weight).log_softmax(-1)
    new = logp.gather(-1, batch.token_ids.view(-1, 1)).view_as(batch.logprobs)
    ratio = (new - batch.logprobs).exp().detach()
    outside = (ratio < 0.8) | (ratio > 1.2)
    assert 0.1 < outside.float().mean() < 0.6
    for edge in (0.8, 1.2):
        assert (ratio.log() - torch.tensor(edge).log()).abs().min() > 0.05


def test_ours_may_err_as_much_as_torch_and_little_more() -> None:
    baseline = Error(1e-6, 1e-7)
    assert bound_for("fp32", True, baseline).value == pytest.approx(2.1e-5)
    assert bound_for("fp32", False, baseline) == bound_for("fp32", False, None)
    assert bound_for("fp32", True, None) == bound_for("fp32", False, None)
    assert not Error(float("nan"), 0.0).within(Error(1.0, 1.0))


def test_a_wrong_a_broken_and_an_absent_rival_are_told_and_not_timed(
    table: Callable[..., None],
) -> None:
    def breaks(case: Case) -> Callable[..., Tensors]:
        def run(*inputs: torch.Tensor) -> Tensors:
            raise KeyError("no such kernel")

        return run

    def absent(case: Case) -> Callable[..., Tensors]:
        return load("no_such_library", "function")

    table(rivals={"torch": torch_rows, "off": with_offset(0.1), "broken": breaks, "absent": absent})
    report = run_case(
        tiny("token_logprobs"), providers("token_logprobs", "off,broken,absent"), CEILINGS, 3, 1.0
    )
    found = {result.provider: result for result in report.results}
    assert {name: result.status for name, result in found.items()} == {
        "torch": "timed",
        "off": "wrong",
        "broken": "failed",
        "absent": "unavailable",
    }
    assert found["off"].error is not None
    assert found["off"].error.value == pytest.approx(0.1, rel=1e-3)
    assert found["off"].samples_ms == []
    assert len(found["torch"].samples_ms) == 3
    text = report.table()
    assert "off: wrong, error 1.00e-01 (at most 1.00e-03)" in text
    assert "broken: failed, KeyError: 'no such kernel'" in text
    assert "absent: unavailable, no_such_library cannot be imported" in text


def test_ours_wrong_ends_with_exit_code_1_and_no_numbers(
    table: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table(ours=with_offset(1e-3))
    out = tmp_path / "bench.json"
    flags = ["--num-rows=4", "--vocab-size=9", f"--json={out}", f"--providers={REFERENCE}"]
    assert cli.main(["bench", "token_logprobs", *flags]) == 1
    captured = capsys.readouterr()
    assert "fuserl-reference: wrong, error 1.00e-03" in captured.err
    assert "nothing was timed" in captured.err
    assert " ms" not in captured.out
    assert not out.exists()


def test_ours_that_breaks_is_refused_too(table: Callable[..., None]) -> None:
    def make(case: Case) -> Callable[..., Tensors]:
        return lambda *inputs: ()

    table(ours=make)
    chosen = providers("token_logprobs", REFERENCE)
    with pytest.raises(WrongAnswer, match="fuserl-reference: failed, ValueError"):
        run_case(tiny("token_logprobs"), chosen, CEILINGS, 3, 1.0)


def test_a_wrong_baseline_excuses_nothing_of_ours(table: Callable[..., None]) -> None:
    table(ours=with_offset(torch.inf), rivals={BASELINE: with_offset(torch.inf)})
    chosen = providers("token_logprobs", REFERENCE)
    with pytest.raises(WrongAnswer, match="fuserl-reference: wrong, error inf"):
        run_case(tiny("token_logprobs"), chosen, CEILINGS, 3, 1.0)


def test_without_memory_is_not_wrong(table: Callable[..., None]) -> None:
    def make(case: Case) -> Callable[..., Tensors]:
        def run(*inputs: torch.Tensor) -> Tensors:
            raise torch.OutOfMemoryError("tried to allocate 9 TB\nand more")

        return run

    table(ours=make)
    chosen = providers("token_logprobs", REFERENCE)
    report = run_case(tiny("token_logprobs"), chosen, CEILINGS, 3, 1.0)
    assert report.results[0].status == "out of memory"
    assert "fuserl-reference: out of memory, tried to allocate 9 TB" in report.table()


# --- providers and options


def test_every_public_op_is_benchmarked() -> None:
    no_ops = {"PRESETS", "use_backend"}
    on_cpus = {"fixed_linear"}
    parts_of_a_step = {"decode_attention_plan", "advance_rows"}  # timed in decode steps
    assert set(OPS) == set(fk.__all__) - no_ops - on_cpus - parts_of_a_step


def test_every_op_is_registered_and_starts_with_torch() -> None:
    for name, op in OPS.items():
        assert name in tables()
        assert next(iter(op.rivals)) == BASELINE
        assert {p.backend for p in providers(name) if p.is_ours} == set(tables()[name])
        assert {p.name for p in providers(name, REFERENCE)} == {REFERENCE, BASELINE}


def test_the_default_is_what_runs_where_nobody_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny("token_logprobs")
    monkeypatch.setattr(native, "why_absent", lambda device_type="cpu": None)
    assert default_provider(case) == "fuserl-native"
    monkeypatch.setattr(native, "why_absent", lambda device_type="cpu": "it is not built")
    with fk.use_backend("reference"):  # a choice is not the default
        assert default_provider(case) == REFERENCE
    assert default_provider(case) == REFERENCE


def test_a_backend_that_cannot_run_says_why() -> None:
    case = tiny("token_logprobs")
    for provider in providers("token_logprobs"):
        if provider.backend == "native":
            with pytest.raises(Unavailable, match="needs a cpu tensor"):
                provider.make(dataclasses.replace(case, device="meta"))
        if provider.backend == "triton":
            with pytest.raises(Unavailable, match="needs a CUDA device"):
                provider.make(case)


def test_what_does_not_exist_is_named_with_what_does() -> None:
    with pytest.raises(ValueError, match=r"op must be one of token_logprobs, .*got 'softmax'"):
        cases_of(BenchConfig(op="softmax"))
    with pytest.raises(ValueError, match=r"providers must be all or some of .*liger.*got unsloth"):
        providers("linear_policy_loss", "torch,unsloth")
    with pytest.raises(ValueError, match=r"dtype must be one of \('auto', 'fp32'.*got 'fp8'"):
        BenchConfig(op="token_logprobs", dtype="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds must be positive"):
        BenchConfig(op="token_logprobs", rounds=0)
    for name in ("num_rows", "num_sequences", "num_slots", "temperature", "top_p"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            BenchConfig(op="token_logprobs", **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_p must be at most 1"):
        BenchConfig(op="sample_tokens", top_p=1.5)


def test_options_that_would_do_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size makes no sense with token_logprobs"):
        cases_of(BenchConfig(op="token_logprobs", hidden_size=8))
    with pytest.raises(ValueError, match="inplace_grad makes no sense with linear_policy_loss"):
        cases_of(BenchConfig(op="linear_policy_loss", inplace_grad=True))
    with pytest.raises(ValueError, match="inplace_grad makes no sense with passes forward"):
        cases_of(BenchConfig(op="token_logprobs", inplace_grad=True, passes="forward"))
    for op, options in (
        ("gae", {"vocab_size": 9}),
        ("sample_tokens", {"num_slots": 9}),
        ("gae", {"with_entropy": True}),
        ("gae", {"with_metrics": True}),
        ("token_logprobs", {"temperature": 0.5}),
        ("ppo_loss", {"top_p": 0.5}),
        ("sample_tokens", {"passes": "forward_backward"}),
    ):
        (name,) = options
        with pytest.raises(ValueError, match=rf"{name} .*makes no sense with {op}"):
            cases_of(BenchConfig(op=op, device="cpu", **options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, not cpu"):
        cases_of(BenchConfig(op="gae", device="cpu", cuda_graph=True))


def test_the_cases_of_an_op() -> None:
    passes = [case.pass_name for case in cases_of(BenchConfig(op="token_logprobs", device="cpu"))]
    assert passes == ["forward", "forward_backward"]
    (case,) = cases_of(BenchConfig(op="linear_policy_loss", device="cpu", vocab_size=99))
    assert (case.vocab_size, case.hidden_size, case.dtype) == (99, 1024, "fp32")
    (case,) = cases_of(BenchConfig(op="token_logprobs", device="cpu", inplace_grad=True))
    assert case.backward
    assert case.inplace_grad
    (case,) = cases_of(BenchConfig(op="gae", device="cpu", num_slots=64))
    assert case.title == "gae forward B=512 T=64 fp32 cpu"
    (case,) = cases_of(BenchConfig(op="sample_tokens", device="cpu", top_p=1.0))
    assert case.title == "sample_tokens forward N=64 V=128256 fp32 cpu temperature 0.8"


# --- measures


def test_floors() -> None:
    peaks = Ceilings(4.3e12, 790e12, "bf16", launch_ms=0.0025)
    case = tiny("token_logprobs", "forward", num_rows=8192, vocab_size=128256, dtype="bf16")
    both = dataclasses.replace(case, pass_name="forward_backward")
    assert rows_cost(case) == Cost(2 * 8192 * 128256, 0)
    assert rows_cost(both) == Cost(6 * 8192 * 128256, 0)
    case = dataclasses.replace(case, op="linear_token_logprobs", hidden_size=4096)
    both = dataclasses.replace(both, hidden_size=4096)
    product = 2 * 8192 * 4096 * 128256
    assert linear_cost(case) == Cost(2 * (8192 + 128256) * 4096, product)
    assert linear_cost(both).num_flops == 3 * product
    assert peaks.floor_ms(linear_cost(case)) == pytest.approx(10.9, abs=0.05)
    assert peaks.floor_ms(linear_cost(both)) == pytest.approx(32.7, abs=0.05)
    assert peaks.floor_ms(Cost(1000, 1)) == 0.0025
    assert Ceilings(1e6, 1e9, "fp32").floor_ms(Cost(1000, 1)) == pytest.approx(1.0)


@pytest.mark.skipif(why_not_measured("cpu") is not None, reason=str(why_not_measured("cpu")))
def test_the_memory_meter_sees_what_is_allocated_and_what_was_freed_again() -> None:
    megabytes = 64

    def allocate_twice() -> torch.Tensor:
        first = torch.ones(megabytes << 18)
        return first + 1

    for _ in range(2):  # the second time the allocator could have kept the first one's memory
        peak = peak_extra_bytes("cpu", allocate_twice)
        assert peak == pytest.approx(2 * megabytes << 20, rel=0.05)
    assert peak_extra_bytes("cpu", lambda: None) < 4 << 20


def test_rounds_take_turns_and_prepare_is_not_timed() -> None:
    order: list[str] = []

    class Recorder(Call):
        def __init__(self, name: str) -> None:
            self._name = name

        def prepare(self) -> None:
            time.sleep(0.02)

        def run(self) -> tuple[Tensors, Tensors]:
            order.append(self._name)
            return (), ()

    samples = interleave("cpu", {"a": Recorder("a"), "b": Recorder("b")}, 50, 0.0)
    assert order == ["a", "b"] * 3, "three rounds, whatever the budget"
    assert max(samples["a"]) < 20
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


def test_ceilings_are_plausible() -> None:
    ceilings = measure_ceilings("cpu", "fp32")
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e16
    first, second = Ceilings(1.0, 4.0, "fp32", 0.003), Ceilings(2.0, 3.0, "fp32", 0.002)
    assert first.better_of(second) == Ceilings(2.0, 4.0, "fp32", 0.002)


def test_the_ceiling_is_that_of_the_faster_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MATMUL_SIZE", {"cpu": 128})
    monkeypatch.setattr(timing, "_COPY_BYTES", {"cpu": 1 << 20})
    shapes: list[tuple[int, ...]] = []

    def fast(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append((*x.shape, *weight.shape))
        return x

    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x

    monkeypatch.setattr(timing.fk, "fixed_linear", slow)
    torch_alone = measure_ceilings("cpu", "fp32").flops_per_second
    assert torch_alone > 2 * 128**3 / 0.01
    monkeypatch.setattr(timing.fk, "fixed_linear", fast)
    assert measure_ceilings("cpu", "fp32").flops_per_second > torch_alone
    assert set(shapes) == {(128,) * 4}
    shapes.clear()
    measure_ceilings("cpu", "fp16")
    assert shapes == [], "it is compiled for fp32 and bf16"


def test_the_gradient_in_place_gets_logits_of_its_own_each_time() -> None:
    problem = OPS["token_logprobs"].problem(tiny("token_logprobs", inplace_grad=True))
    before = problem.inputs[0].detach().clone()
    chosen = Provider(REFERENCE, OPS["token_logprobs"].ours, "reference")
    call = Call(problem, chosen.make(problem.case), "reference")
    for _ in range(2):
        call.prepare()
        assert measure_error(problem, *call.run()).within(Error(1e-5, 1e-5))
    assert torch.equal(problem.inputs[0], before)
    assert problem.required_bytes == 0


# --- what is told


def test_numbers_of_a_report() -> None:
    case = tiny("token_logprobs")
    error = Error(1e-6, 1e-7)
    slow = Result("torch", False, "timed", "", error, 0.1, 4_000_000, [4.0, 4.0, 4.0])
    fast = Result(REFERENCE, True, "timed", "", error, 0.1, 1_500_000, [1.0, 2.0, 1.0])
    report = CaseReport(case, CEILINGS, 0.5, 1_000_000, "torch", [slow, fast])
    assert [result.provider for result in report.timed()] == [REFERENCE, "torch"]
    assert report.speedup(fast) == 4.0
    record = report.to_json()["results"][1]
    assert record["share_of_limit"] == 0.5
    assert record["peak_beyond_gradients_bytes"] == 500_000
    row = report.table().splitlines()[3].split()
    assert row[:4] == [REFERENCE, "1", "[1,", "1.5]"]
    assert row[4:] == ["4.00x", "50", "%", "2", "0", "1.0e-06", "1.0e-07", "0.1", "s"]
    alone = CaseReport(case, CEILINGS, 0.5, 0, "torch", [fast])
    assert alone.speedup(fast) is None
    assert "  -  " in alone.table()


@pytest.mark.parametrize("op", OPS)
def test_json_and_plot(op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content_path, plot = tmp_path / "new" / "bench.json", tmp_path / "bench.png"
    config = BenchConfig(
        op=op,
        device="cpu",
        rounds=4,
        providers=f"{REFERENCE}, torch",
        json=str(content_path),
        plot=str(plot),
        **tiny_sizes(op),  # type: ignore[arg-type]
    )
    reports = run_bench(config)
    content = json.loads(content_path.read_text())
    assert set(content) == {"format", "machine", "cases"}
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert {"date", "device", "threads", "commit", "platform"} <= set(content["machine"])
    assert len(content["cases"]) == len(reports) == len(OPS[op].passes)
    for case in content["cases"]:
        assert case["case"]["op"] == op
        assert case["ceilings"]["bytes_per_second"] == 1e9
        for result in case["results"]:
            assert result["status"] == "timed"
            assert len(result["samples_ms"]) == 4
            low, high = result["quartiles_ms"]
            assert low <= result["median_ms"] <= high
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert REFERENCE in capsys.readouterr().out


def test_help_of_bench_imports_no_torch() -> None:
    code = (
        "import sys\nfrom fuserl.cli import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "--budget-seconds" in done.stdout


def test_a_problem_is_the_same_each_time() -> None:
    first, second = (OPS["token_logprobs"].problem(tiny("token_logprobs")) for _ in range(2))
    assert isinstance(first, Problem)
    assert torch.equal(first.inputs[0], second.inputs[0])

"""Where Triton is absent or has no device the package says so; the compile gate runs and judges."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fuserl_kernels import backend, compile_gate, triton_runtime
from fuserl_kernels.compile_cases import Case
from fuserl_kernels.triton_runtime import Configuration

needs_triton = pytest.mark.skipif(
    triton_runtime.why_no_compiler() is not None, reason="Triton cannot be imported"
)


def run(*arguments, **environment):
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_triton_the_package_works_and_says_why():
    program = """
import sys
sys.modules["triton"] = None
import torch
import fuserl_kernels as fk
from fuserl_kernels import backend
logits, token_ids = torch.randn(2, 5), torch.tensor([0, 4])
assert fk.token_logprobs(logits, token_ids).isfinite().all()
print(backend.available()["triton"])
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no: Triton is not usable")
    assert "pip install triton" in done.stdout


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_remedy_is_named():
    program = """
import torch
from fuserl_kernels import backend
table = {"triton": print, "reference": print}
print(backend.available()["triton"])
with backend.use_backend("triton"):
    backend.select("token_logprobs", table, torch.zeros(1))
"""
    done = run("-c", program, TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert done.stdout.startswith("no: torch finds no GPU")
    assert "cannot run with backend 'triton'" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


@needs_triton
def test_auto_gives_no_cpu_tensor_to_the_interpreter():
    table = {"triton": print, "reference": len}
    assert backend.select("op", table, torch.zeros(1)) is len
    assert backend.available()["triton"].startswith("yes")


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_gate_compiles_and_reports(target, tmp_path):
    report = tmp_path / "gate.json"
    done = run(
        *("-m", "fuserl_kernels.compile_gate", "--op", "token_logprobs_bwd", "--first"),
        *("--target", target, "--json", str(report), "--workers", "1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 compiled with Triton" in done.stdout
    (row,) = json.loads(report.read_text())["rows"]
    assert row["registers"] > 0
    assert row["spill_bytes"] == 0
    assert row["warps"] is None if target == "gfx942" else row["warps"] >= 16
    assert ("load 128" in row["instructions"]) == (target == "sm_90")


@needs_triton
def test_the_gate_refuses_an_unknown_op():
    done = run("-m", "fuserl_kernels.compile_gate", "--op", "nothing")
    assert done.returncode == 2
    assert "no kernel belongs to ['nothing']" in done.stderr


@needs_triton
def test_a_broken_bound_fails_the_row():
    program = """
import dataclasses
from fuserl_kernels.compile_cases import cases
from fuserl_kernels.compile_gate import measure
case = next(case for case in cases("sm_90") if case.op == "token_logprobs_bwd")
print(measure(dataclasses.replace(case, min_warps=65)).failures)
broken = dataclasses.replace(case, arguments=case.arguments | {"logits_ptr": "fp32"})
print(measure(broken).failures)
print(measure(dataclasses.replace(case, load_bits=256, tensor_cores="HGMMA")).failures)
"""
    done = run("-c", program, TRITON_INTERPRET="0", TRITON_ALWAYS_COMPILE="1")
    first, second, third = done.stdout.splitlines()[-3:]
    assert "warps resident, fewer than 65" in first
    assert "does not compile" in second
    assert "loads of fewer than 256 bits" in third
    assert "no HGMMA instruction" in third


@pytest.mark.parametrize(
    ("counts", "failures"),
    [
        ({"load 128": 2, "load 32": 3}, []),
        ({"load 128": 2, "load 32": 9}, ["9 loads of fewer than 128 bits"]),
        ({"load 32": 3}, ["no loads of 128 bits"]),
        ({}, ["no loads of 128 bits"]),  # as of a disassembly that is not understood
    ],
)
def test_rows_are_read_in_wide_loads(counts, failures):
    case = Case(
        *("op", "variant", "sm_90", None, Configuration(4, 1), {}),
        min_warps=1,
        max_spill_bytes=0,
        num_bytes=0,
        load_bits=128,
    )
    assert compile_gate._wrong_instructions(case, counts) == failures


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "expected"),
    [
        (32, 0, 8, (8, 64)),  # warps run out
        (128, 0, 4, (4, 16)),  # registers: 4 warps of 4096 a quarter
        (129, 0, 4, (3, 12)),
        (255, 150000, 8, (1, 8)),
        (32, 100000, 4, (2, 8)),  # shared memory
    ],
)
def test_occupancy(registers, shared_bytes, num_warps, expected):
    assert compile_gate.occupancy("sm_90", registers, shared_bytes, num_warps) == expected

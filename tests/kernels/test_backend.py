"""Choosing an implementation: names, explicit choices that cannot run, the process-wide reach."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import fuserl_kernels as fk
from fuserl_kernels import backend, native
from fuserl_kernels.registration import tables

LOGITS, IDS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)


def test_unknown_name_lists_the_valid_ones():
    with (
        pytest.raises(ValueError, match="auto, triton, native, reference, not 'cuda'"),
        fk.use_backend("cuda"),
    ):
        pass


def test_an_op_without_the_implementation_raises():
    for choice in ("triton", "native"):
        with (
            fk.use_backend(choice),
            pytest.raises(RuntimeError, match=rf"an_op cannot run .*'{choice}'.* auto, reference"),
        ):
            backend.select("an_op", {"reference": print}, LOGITS)


def test_a_dtype_that_cannot_run_raises_and_auto_takes_the_reference():
    dtype = torch.float64
    with fk.use_backend("native"), pytest.raises(RuntimeError, match=f"not {dtype}"):
        fk.token_logprobs(LOGITS.to(dtype), IDS)
    assert fk.token_logprobs(LOGITS.to(dtype), IDS).isfinite().all()


def test_an_absent_native_module_raises_with_the_remedy_and_auto_goes_on(monkeypatch):
    reason = "the compiled CPU kernels are not usable; install again with FUSERL_BUILD=require"
    monkeypatch.setattr(native, "why_absent", lambda *_: reason)
    with fk.use_backend("native"), pytest.raises(RuntimeError, match="FUSERL_BUILD=require"):
        fk.token_logprobs(LOGITS, IDS)
    assert fk.token_logprobs(LOGITS, IDS).isfinite().all()
    assert backend.available()["native"] == f"no: {reason}"


CUDA_TENSOR = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)


def test_native_means_the_kernels_for_the_tensors_device(monkeypatch):
    """CUDA C++ where an op has it, and what is missing is said: the half, or the module."""
    both = backend.PerDevice(cpu=lambda tensor, n: -n, cuda=lambda tensor, n: n)
    with fk.use_backend("native"):
        with pytest.raises(RuntimeError, match=r"needs a cpu tensor, not cuda:0.*choose auto"):
            backend.select("an_op", {"native": print}, CUDA_TENSOR)
        monkeypatch.setattr(native, "_load", lambda device: (None, f"no module for {device}"))
        with pytest.raises(RuntimeError, match="no module for cuda"):
            backend.select("an_op", {"native": both}, CUDA_TENSOR)
        monkeypatch.setattr(native, "_load", lambda device: ("the module", None))
        assert backend.select("an_op", {"native": both}, CUDA_TENSOR)(CUDA_TENSOR, 3) == 3
        assert backend.select("an_op", {"native": both}, LOGITS)(LOGITS, 3) == -3


def test_auto_leaves_cuda_tensors_to_triton():
    both = backend.PerDevice(cpu=min, cuda=max)
    assert backend.select("an_op", {"reference": print, "native": both}, CUDA_TENSOR) is print


def test_the_report_names_the_cuda_module_and_its_remedy(monkeypatch):
    reports = backend.available()
    assert list(reports) == ["reference", "native", "native cuda", "triton"]
    monkeypatch.setitem(native._MODULES, "cuda", ("_no_such_module", *native._MODULES["cuda"][1:]))
    native._load.cache_clear()
    try:
        assert backend.available()["native cuda"].startswith("no: the compiled CUDA kernels are")
        assert "FUSERL_BUILD=cuda" in backend.available()["native cuda"]
    finally:
        native._load.cache_clear()


def test_the_choice_reaches_other_threads_and_ends_with_the_block():
    seen = []

    def call():
        try:
            backend.select("an_op", {"reference": print}, LOGITS)
        except RuntimeError as error:
            seen.append(str(error))

    with fk.use_backend("triton"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(seen) == 1
    call()
    assert len(seen) == 1


def test_blocks_nest():
    with fk.use_backend("triton"):
        with fk.use_backend("reference"):
            backend.select("an_op", {"reference": print}, LOGITS)
        with pytest.raises(RuntimeError):
            backend.select("an_op", {"reference": print}, LOGITS)


@pytest.mark.parametrize(
    ("value", "code"),
    [("reference", 0), ("nonsense", 1)],
)
def test_the_environment_sets_the_default(value, code):
    program = "from fuserl_kernels import backend; print(backend._choice)"
    environment = os.environ | {
        "FUSERL_BACKEND": value,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    if code:
        assert "FUSERL_BACKEND must be one of auto, triton, native, reference" in done.stderr
    else:
        assert done.stdout.strip() == value


# Ops without an implementation, and why.
LACKING = {
    "fixed_linear": {"triton"},  # a GPU's library has no order worth pinning yet: torch's product
    "fixed_linear_bwd": {"triton"},
}


def test_every_op_has_every_implementation():
    for name, table in tables().items():
        assert set(table) | LACKING.get(name, set()) == {"reference", "native", "triton"}, name
        assert not set(table) & LACKING.get(name, set()), name
    assert LACKING.keys() <= tables().keys()


def test_only_public_functions_are_exported():
    for name in fk.__all__:
        assert getattr(fk, name).__doc__

"""The doctor says what training attention each device and dtype gets, and why."""

from typing import Any

import pytest

from fuserl import doctor
from fuserl.model import attention
from fuserl_kernels import native


def test_it_reports_the_attention_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.run_doctor()
    report = capsys.readouterr().out.split("\nattention while training\n")[1]
    lines = report.split("\n\n")[0].splitlines()
    assert any(line.split()[:3] == ["cpu", "float32", "sdpa"] for line in lines)
    assert any(line.split()[:3] == ["cpu", "bfloat16", "sdpa"] for line in lines)
    assert any(line.startswith("    with soft caps") and "plain" in line for line in lines)


@pytest.mark.parametrize("absent", [None, "no compiler"])
def test_it_says_how_rollouts_run(absent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_absent", lambda *_: absent)
    monkeypatch.setattr(native, "describe", lambda *_: "made up")
    cpu, cuda, others = doctor._rollouts(["cpu", "cuda"])
    assert ("C++" in cpu) == (absent is None)
    assert ("bits depend on the batch" in cpu) == (absent is not None)
    assert "captured graph" in cuda
    assert "waves" in others


@pytest.mark.parametrize("installed", [False, True])
def test_on_cuda_it_depends_on_flash_attn(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> Any:
        return print if installed else None

    monkeypatch.setattr(attention, "_flash_attn", found)
    halves = [line for line in doctor._attention(["cuda"]) if "float32 " not in line]
    best = next(line for line in halves if line.startswith("cuda bfloat16"))
    if installed:
        assert "flash-attn (installed)" in best
    else:
        assert "varlen (" in best
        assert "flash-attn is not installed" in best
        assert "install flash-attn" in halves[-1]  # soft caps

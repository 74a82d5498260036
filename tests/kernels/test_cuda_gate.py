"""The gate over CUDA C++: what it reads from the tools, what it lets pass, and its exit codes."""

import shutil
import subprocess

import pytest

from fuserl_kernels import cuda_build, cuda_gate
from fuserl_kernels.cuda_gate import judge, readable, resources, wide_loads

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90'
ptxas info    : Function properties for _Z3addPf
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes stack, 152 bytes smem
ptxas info    : Compiling entry function '_Z3mulPf' for 'sm_90'
ptxas info    : Function properties for _Z3mulPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers
"""
SASS = """
		Function : _Z3addPf
        /*0030*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
		Function : _Z3mulPf
        /*0030*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
"""
FITS = {
    "kernel": "sample_row<float, true, Plain>",
    "target": "sm_90",
    "registers": 80,
    "spill_bytes": 0,
    "shared_bytes": 41184,
    "num_wide_loads": 4,
}


def test_resources_of_each_kernel():
    assert list(resources(PTXAS)) == [("_Z3addPf", 40, 16, 152), ("_Z3mulPf", 12, 0, 0)]
    with pytest.raises(RuntimeError, match="no resources of _Z3addPf"):
        list(resources(PTXAS.replace("Used 40", "Took 40")))


def test_wide_loads_of_each_kernel():
    assert wide_loads(SASS) == {"_Z3addPf": 2, "_Z3mulPf": 0}


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt to read C++ symbols")
def test_names_are_those_of_the_source():
    symbol = (
        "_ZN6fuserl4cuda12_GLOBAL__N_110sample_rowIfLb1ENS1_5PlainEEEvNS0_8SamplingENS1_7OptionsE"
    )
    assert readable([symbol]) == {symbol: "sample_row<float, true, Plain>"}


def test_what_fits_passes():
    row = judge(**FITS)
    assert row.failures == ()
    assert (row.blocks, row.warps) == (3, 24)
    assert judge(**FITS | {"num_wide_loads": None}).failures == ()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"spill_bytes": 4}, "4 bytes spilled"),
        ({"registers": 200}, "8 warps resident, fewer than 16"),
        ({"shared_bytes": 120_000}, "8 warps resident, fewer than 16"),
        ({"num_wide_loads": 3}, "3 loads of 128 bits, not 4"),
        ({"kernel": "unknown<float>"}, "BOUNDS has no unknown"),
    ],
)
def test_what_breaks_a_bound_fails(broken, message):
    assert any(message in failure for failure in judge(**FITS | broken).failures)


def run_gate(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["cuda_gate", *map(str, arguments)])
    return cuda_gate.main()


def test_without_nvcc_it_says_so(monkeypatch, tmp_path, capsys):
    (tmp_path / "kernel.cu").touch()
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    assert run_gate(monkeypatch, "--sources", tmp_path) == 0
    assert capsys.readouterr().out == "nvcc is not installed, so no CUDA kernel was compiled\n"


def test_a_folder_without_sources_is_refused(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_gate(monkeypatch, "--sources", tmp_path)
    assert "holds no .cu file" in capsys.readouterr().err


@pytest.mark.skipif(cuda_build.nvcc() is None, reason="needs nvcc to compile a kernel")
@pytest.mark.parametrize(("body", "message"), [("x[0] = y;", "does not compile"), ("", "no odd")])
def test_a_kernel_that_breaks_or_is_unknown_fails(monkeypatch, tmp_path, capsys, body, message):
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "odd.cu").write_text(f"__global__ void odd(float* x) {{ {body} }}")
    assert run_gate(monkeypatch, "--sources", folder) == 1
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


def test_nvcc_is_looked_for_where_cuda_home_says(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_build.nvcc() is None  # an explicit home is not second-guessed
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nprintf 'sm_75\\nsm_80\\nsm_90\\n'\n")
    compiler.chmod(0o755)
    assert cuda_build.nvcc() == compiler
    assert cuda_build.architectures(compiler) == ("80", "90")
    assert cuda_build.targets(("80", "90"))[-1] == "-gencode=arch=compute_90,code=compute_90"


def test_torch_is_asked_without_an_import(monkeypatch, tmp_path):
    """By its version file: of a CUDA build, of a CPU build, and where there is no torch."""
    for text, expected in [("cuda = '13.0'\n", "13.0"), ("cuda = None\n", None)]:
        (tmp_path / "version.py").write_text(text)
        spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
        monkeypatch.setattr("importlib.util.find_spec", lambda name, spec=spec: spec)
        assert cuda_build.torch_cuda() == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda_build.torch_cuda() is None


def test_a_build_without_nvcc_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_build, "nvcc", lambda: None)
    with pytest.raises(FileNotFoundError, match="nvcc is neither in CUDA_HOME"):
        cuda_build.build_module([], [], tmp_path / "module.so")


@pytest.mark.skipif(cuda_build.nvcc() is None, reason="needs nvcc to fail")
def test_a_failing_build_is_an_error(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("wrong")
    with pytest.raises(subprocess.CalledProcessError):
        cuda_build.build_module([str(source)], [], tmp_path / "out" / "module.so")

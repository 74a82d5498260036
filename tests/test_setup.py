"""Which native extensions an install compiles, by FUSERL_BUILD and by what the machine has."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from setuptools.errors import CompileError

pytest.importorskip("pybind11", reason="the extensions are built with pybind11")

ROOT = Path(__file__).parents[1]
CPU, CUDA = "fuserl_kernels._native", "fuserl_kernels._cuda"


@pytest.fixture
def extensions(monkeypatch, tmp_path):
    """Of an install in a mode, with or without nvcc, beside a torch with or without CUDA."""

    def run(mode, has_nvcc, torch_cuda):
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir()
        if has_nvcc:
            compiler.touch(mode=0o755)
        (tmp_path / "version.py").write_text(f"cuda = {torch_cuda!r}\n")
        spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("FUSERL_BUILD", mode)
        monkeypatch.chdir(ROOT)
        arguments = {}
        monkeypatch.setattr(setuptools, "setup", arguments.update)
        runpy.run_path("setup.py")
        return {extension.name: extension for extension in arguments["ext_modules"]}

    return run


@pytest.mark.parametrize(
    ("mode", "has_nvcc", "torch_cuda", "names"),
    [
        ("none", True, "13.0", set()),
        ("cpu", True, "13.0", {CPU}),
        ("require", True, "13.0", {CPU}),
        ("auto", True, "13.0", {CPU, CUDA}),
        ("auto", True, None, {CPU}),  # a CPU build of torch could not use it
        ("auto", False, "13.0", {CPU}),
        ("cuda", True, None, {CPU, CUDA}),
        ("cuda", False, None, {CPU, CUDA}),  # and fails when it is built
    ],
)
def test_what_is_compiled(extensions, mode, has_nvcc, torch_cuda, names):
    found = extensions(mode, has_nvcc, torch_cuda)
    assert found.keys() == names
    strict = mode in ("require", "cuda")
    assert all(extension.optional is not strict for extension in found.values())


def test_each_module_has_its_own_sources(extensions):
    found = extensions("cuda", True, None)
    sources = {name: set(extension.sources) for name, extension in found.items()}
    assert not sources[CPU] & sources[CUDA]
    everything = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.c*")}
    headers = {name for name in everything if name.endswith(".cuh")}
    assert sources[CPU] | sources[CUDA] == everything - headers
    assert headers <= set(found[CUDA].depends)


def test_an_unknown_mode_lists_the_valid_ones(extensions):
    with pytest.raises(ValueError, match="one of auto, none, cpu, require, cuda, not 'gpu'"):
        extensions("gpu", True, None)


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/sh\necho sm_52\n",  # too old
        "#!/bin/sh\nexit 1\n",
        "\x7fELF of another machine",
    ],
)
def test_an_nvcc_that_cannot_compile_is_a_failed_compilation(monkeypatch, tmp_path, script):
    """Which setuptools turns into a warning, or into the end of a strict install."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(script)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("FUSERL_BUILD", "none")
    monkeypatch.chdir(ROOT)
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    defined = runpy.run_path("setup.py")
    command = arguments["cmdclass"]["build_ext"](setuptools.Distribution())
    command.ensure_finalized()
    command.build_lib = str(tmp_path)
    with pytest.raises(CompileError, match="the CUDA kernels: "):
        command.build_extension(defined["cuda_extension"]())

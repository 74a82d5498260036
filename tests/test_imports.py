"""Imports point one way, and what is heavy is imported only where it is used."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE, KERNELS = ROOT / "engine" / "fuserl", ROOT / "kernels" / "fuserl_kernels"


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(files: Iterator[Path], *banned: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported(path)
        if any(name == package or name.startswith(f"{package}.") for package in banned)
    ]


def modules(*paths: Path) -> Iterator[Path]:
    """Python files of folders and files."""
    for path in paths:
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        assert found, path
        yield from found


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_import_nothing_of_the_engine() -> None:
    assert offenders(modules(KERNELS), "fuserl", "transformers", "tests", "benchmarks") == []


def test_the_definitions_import_torch_alone() -> None:
    heavy = ("triton", "fuserl_kernels.native", "fuserl_kernels.backend", "numpy")
    assert offenders(modules(KERNELS / "reference"), *heavy) == []


def test_the_engine_imports_no_test_and_no_benchmark() -> None:
    assert offenders(modules(ENGINE), "tests", "benchmarks", "pytest", "hypothesis") == []


def test_phases_and_models_import_no_stage() -> None:
    below = [ENGINE / name for name in ("model", "data", "rollout")]
    names = "batch sequences scoring shaping update rewards policy optimizer checkpoint run metrics"
    below += [ENGINE / f"{name}.py" for name in (*names.split(), "config", "conventions")]
    assert offenders(modules(*below), "fuserl.stages", "fuserl.cli", "fuserl.commands") == []


def test_models_and_data_import_no_phase() -> None:
    above = [f"fuserl.{n}" for n in ("rollout", "scoring", "shaping", "update", "run", "policy")]
    assert offenders(modules(ENGINE / "model", ENGINE / "data"), *above) == []


def test_the_source_roots_are_no_packages() -> None:
    assert not (ROOT / "engine" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_kernels_loads_no_transformers() -> None:
    code = "import sys, fuserl_kernels; print('transformers' in sys.modules)"
    assert fresh(code).strip() == "False"


@pytest.mark.parametrize("command", ["--help", "sft --help", "rl --help", "profile --help"])
def test_help_imports_no_torch(command: str) -> None:
    code = f"""
import sys
from fuserl.cli import main
try:
    main({command.split()!r})
except SystemExit as stop:
    assert not stop.code
print([name for name in ("torch", "transformers") if name in sys.modules])
"""
    out = fresh(code)
    assert out.splitlines()[-1] == "[]"
    assert "usage" in out.lower()

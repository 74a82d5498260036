"""Two source roots, one distribution, and optional native extensions that never need torch.

FUSERL_BUILD chooses what is compiled:
    auto      (default) the CPU kernels if a compiler works, else pure Python with a warning; the
              CUDA kernels too where nvcc is found and the torch at hand is built for CUDA
    none      nothing
    cpu       the CPU kernels, if a compiler works
    require   the CPU kernels, and a failing compiler fails the install
    cuda      both, and a failing compiler, or no nvcc, fails the install
"""

import os
import runpy
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

BUILD_MODES = ("auto", "none", "cpu", "require", "cuda")
CUDA_MODULE = "fuserl_kernels._cuda"
# The file alone: the package imports torch.
CUDA_BUILD = runpy.run_path("kernels/fuserl_kernels/cuda_build.py")


def native_extensions() -> list[Extension]:
    mode = os.environ.get("FUSERL_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise ValueError(f"FUSERL_BUILD must be one of {', '.join(BUILD_MODES)}, not {mode!r}")
    if mode == "none":
        return []
    extensions = [cpu_extension()]
    if mode == "cuda" or (mode == "auto" and CUDA_BUILD["nvcc"]() and CUDA_BUILD["torch_cuda"]()):
        extensions.append(cuda_extension())
    for extension in extensions:
        # An optional extension turns a compiler failure into a warning and a pure Python install.
        extension.optional = mode not in ("require", "cuda")
    return extensions


def cpu_extension() -> Extension:
    from pybind11.setup_helpers import ParallelCompile, Pybind11Extension

    ParallelCompile().install()  # a file a core; setuptools takes one after another
    return Pybind11Extension(
        "fuserl_kernels._native",
        files("*.cpp", "cpu/*.cpp"),
        depends=files("*.h", "cpu/*.h"),
        cxx_std=17,
        # GCC 12 takes the undefined operand of its own AVX-512 intrinsics for a mistake.
        extra_compile_args=["-O3", "-pthread", "-Wno-maybe-uninitialized"],
        extra_link_args=["-pthread"],
    )


def cuda_extension() -> Extension:
    return Extension(
        CUDA_MODULE,
        files("cuda/*.cpp", "cuda/*.cu"),
        depends=files("bindings.h", "cpu/*.h", "cuda/*.h", "cuda/*.cuh"),
    )


def files(*patterns: str) -> list[str]:
    return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))


class BuildExtensions(build_ext):
    """setuptools', but the CUDA module is compiled and linked by nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != CUDA_MODULE:
            super().build_extension(ext)
            return
        from pybind11 import get_include

        include = ["csrc", get_include(), sysconfig.get_path("include")]
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(Path(name).stat().st_mtime for name in ext.sources + ext.depends)
        if target.exists() and target.stat().st_mtime > newest and not self.force:
            return
        try:
            CUDA_BUILD["build_module"](ext.sources, include, target)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise CompileError(f"the CUDA kernels: {error}") from error


setup(
    name="fuserl",
    version="0.1.0",
    description="A custom-kernel RLHF engine: SFT, reward model and RL in one process",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages("engine") + find_packages("kernels"),
    package_dir={"fuserl": "engine/fuserl", "fuserl_kernels": "kernels/fuserl_kernels"},
    package_data={"fuserl": ["py.typed"], "fuserl_kernels": ["py.typed"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildExtensions},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "transformers>=5.17,<6",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "huggingface-hub>=1.0",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "pyyaml>=6.0",
        "rouge-score>=0.1.2",
        "tqdm>=4.66",
        "tyro>=1.0,<2",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=5", "hypothesis>=6.100", "pybind11>=2.13"],
        "oracles": ["trl==1.16.0", "liger-kernel==0.8.5", "peft==0.21.2"],
        "lint": ["ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["fuserl=fuserl.cli:main"]},
)

"""Two source roots, one distribution, and an optional native extension that never needs torch.

FUSERL_BUILD chooses what is compiled:
    auto      (default) the CPU kernels if a compiler works, else pure Python with a warning
    none      nothing
    cpu       as auto, said explicitly
    require   the CPU kernels, and a failing compiler fails the install
"""

import os
from pathlib import Path

from setuptools import find_packages, setup

BUILD_MODES = ("auto", "none", "cpu", "require")


def native_extensions() -> list:
    mode = os.environ.get("FUSERL_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise ValueError(f"FUSERL_BUILD must be one of {', '.join(BUILD_MODES)}, not {mode!r}")
    if mode == "none":
        return []
    from pybind11.setup_helpers import Pybind11Extension

    extension = Pybind11Extension(
        "fuserl_kernels._native",
        sorted(str(path) for path in Path("csrc").glob("**/*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
        cxx_std=17,
        # GCC 12 takes the undefined operand of its own AVX-512 intrinsics for a mistake.
        extra_compile_args=["-O3", "-pthread", "-Wno-maybe-uninitialized"],
        extra_link_args=["-pthread"],
    )
    # An optional extension turns a compiler failure into a warning and a pure Python install.
    extension.optional = mode != "require"
    return [extension]


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
        "test": ["pytest>=8", "pytest-benchmark>=5", "hypothesis>=6.100"],
        "oracles": ["trl==1.16.0", "liger-kernel==0.8.5", "peft==0.21.2"],
        "lint": ["ruff", "mypy", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["fuserl=fuserl.cli:main"]},
)

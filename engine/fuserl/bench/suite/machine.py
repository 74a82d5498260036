"""What a measurement was made on: the device as it was found, the sources, and how both are told
apart from others."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from fuserl.bench import report

_SOURCES = {"engine": (".py",), "kernels": (".py",), "csrc": (), "tests": (".py",), "setup.py": ()}
"""Folders and files below the root, with the suffixes that count (none given: all)."""
_SMI_FIELDS = {
    "driver": "driver_version",
    "memory_mb": "memory.total",
    "memory_used_mb": "memory.used",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "temperature_c": "temperature.gpu",
    "power_w": "power.draw",
}


def describe(root: Path, device: str, commit: str | None) -> dict[str, Any]:
    """Of the machine and the tree at `root`. commit: where there is no git tree to ask."""
    found = report.describe_machine(device, torch.get_num_threads())
    found |= {"commit": commit or found["commit"], "sources": source_digest(root)}
    found["modules"] = built_modules(root)
    found |= {"cpus": os.cpu_count(), "nvcc": _first_line("nvcc", "--version", line=-1)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            **device_state(),
        }
    return found


def device_state() -> dict[str, str]:
    """Clocks, heat and memory of the first GPU now, as nvidia-smi gives them; empty without it."""
    query = f"--query-gpu={','.join(_SMI_FIELDS.values())}"
    line = _first_line("nvidia-smi", query, "--format=csv,noheader,nounits")
    if line is None:
        return {}
    return dict(zip(_SMI_FIELDS, (value.strip() for value in line.split(",")), strict=False))


def source_digest(root: Path) -> str:
    """Of all that decides what a test says or a kernel does; a commit is not known everywhere."""
    digest = hashlib.sha256()
    for path in _source_files(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def built_modules(root: Path) -> dict[str, str]:
    """Digests of the native modules that are there: with one more, or another, other code runs."""
    folder = root / "kernels" / "fuserl_kernels"
    paths = sorted(path for suffix in EXTENSION_SUFFIXES for path in folder.glob(f"_*{suffix}"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def _source_files(root: Path) -> Iterator[Path]:
    for name, suffixes in _SOURCES.items():
        top = root / name
        paths = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for path in paths:
            if path.suffix in suffixes or not suffixes:
                yield path


def _first_line(*command: str, line: int = 0) -> str | None:
    """A line of what a program prints (line: which of them); None where there is no such program
    or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[line] if done.returncode == 0 and lines else None

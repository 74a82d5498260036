"""`fuserl doctor`: what is installed, which implementation each op uses, what would be faster."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

import fuserl_kernels  # noqa: F401 - registers the ops
from fuserl.model.attention import choice
from fuserl_kernels import backend
from fuserl_kernels.registration import tables

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy")


def run_doctor() -> None:
    """Print the report. It looks and changes nothing."""
    print(f"fuserl {_version('fuserl')}, Python {platform.python_version()}, {platform.platform()}")
    print("\nversions")
    for name in _PACKAGES:
        print(f"  {name:14}{_version(name)}")
    print("\ndevices")
    print(f"  cpu           {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    print(f"  cuda          {_cuda()}")
    print("\nimplementations")
    for name, state in backend.available().items():
        print(f"  {name:14}{state}")
    choice = os.environ.get("FUSERL_BACKEND", "auto")
    print(f"\nin use (FUSERL_BACKEND={choice}; float32)")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op, table in tables().items():
        used = ", ".join(f"{device}: {_used(op, table, device)}" for device in devices)
        print(f"  {op:26}{used}")
    print("\nattention while training")
    for line in _attention(devices):
        print(f"  {line}")
    print("\nrollouts")
    for line in _rollouts(devices):
        print(f"  {line}")
    advice = _advice()
    print("\nto go faster" if advice else "\nnothing to install would make this machine faster")
    for line in advice:
        print(f"  - {line}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        return f"none (this torch is {built})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _used(op: str, table: backend.Table, device: str) -> str:
    """The implementation an fp32 tensor on `device` would get."""
    try:
        chosen = backend.select(op, table, torch.empty(0, device=device))
    except RuntimeError as error:
        return f"none ({error})"
    return next(name for name, implementation in table.items() if implementation is chosen)


def _attention(devices: Sequence[str]) -> list[str]:
    """What trains models of each device and dtype, and why; of those with soft-capped scores
    (Gemma 2) where it is another."""
    lines = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            kind = f"{device} {str(dtype).removeprefix('torch.')}"
            name, why = choice(torch.device(device), dtype)
            lines.append(f"{kind:26}{name} ({why})")
            capped = choice(torch.device(device), dtype, softcap=True)
            if capped != (name, why):
                lines.append(f"{'  with soft caps':26}{capped[0]} ({capped[1]})")
    return lines


def _rollouts(devices: Sequence[str]) -> list[str]:
    """What decodes on each device."""
    if backend.available()["native"].startswith("no"):
        cpu = "the decoder's modules, with torch's products: bits depend on the batch"
    else:
        cpu = "a loop in C++ for Llama-style families, else the decoder's modules; products in a"
        cpu += " fixed order"
    lines = [f"{'cpu':26}{cpu}"]
    if "cuda" in devices:
        lines.append(f"{'cuda':26}the decoder's modules, each step a captured graph")
    lines.append(f"{'through transformers':26}in waves: all rows of one begin together")
    return lines


def _advice() -> list[str]:
    advice = []
    if backend.available()["native"].startswith("no"):
        advice.append(
            "the compiled CPU kernels are missing: install a C++17 compiler (Debian: "
            "apt install g++) and install fuserl again; FUSERL_BUILD=require shows why it failed"
        )
    if not torch.cuda.is_available():
        advice.append("everything: a CUDA GPU and a CUDA build of torch")
    return advice

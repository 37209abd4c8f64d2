"""Python, the packages, DeepSpeed's compiled operations, and quantization."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from ptft_dist.doctor.finding import Finding
from ptft_dist.engine.operations import compilable

MAIN = ("torch", "accelerate", "deepspeed", "transformers", "tokenizers", "datasets", "peft", "bitsandbytes", "trl")
OPERATIONS = {"CPUAdamBuilder": "offloading of the optimizer", "AsyncIOBuilder": "offloading to NVMe"}
"""DeepSpeed's builder -> what needs it."""


def packages() -> Iterator[Finding]:
    """Python and the packages that this one requires, with their versions."""
    yield Finding("packages", "python", "ok", platform.python_version())
    for text in metadata.requires("ptft_dist") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = package(wanted)
        if found.level != "ok" or wanted.name in MAIN:
            yield found


def package(wanted: Requirement) -> Finding:
    """Whether a required package is installed in a version that is allowed."""
    remedy = f"pip install -c constraints.txt '{wanted.name}{wanted.specifier}'"
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding("packages", wanted.name, "error", "not installed", remedy)
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding("packages", wanted.name, "error", f"{version}; needed: {wanted.specifier}", remedy)
    return Finding("packages", wanted.name, "ok", version)


def deepspeed_operations(*, with_gpu: bool) -> Iterator[Finding]:
    """Whether DeepSpeed can compile what offloading needs; it compiles it when it is first used."""
    able = compilable(list(OPERATIONS))
    for name, use in OPERATIONS.items():
        if able[name]:
            yield Finding("DeepSpeed", name, "ok", f"can be compiled ({use})")
        else:
            parts = ["a C++ compiler", "ninja", *(["libaio-dev"] if name.startswith("Async") else [])]
            remedy = "install " + ", ".join([*parts, *(["the CUDA toolkit (nvcc)"] if with_gpu else [])])
            yield Finding("DeepSpeed", name, "warning", f"cannot be compiled; needed for {use}", remedy)


def quantization() -> Iterator[Finding]:
    """Whether bitsandbytes quantizes a matrix to NF4 and back, on the first GPU or on the CPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would miss an optional package
    try:
        from bitsandbytes import functional

        weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
        packed, state = functional.quantize_4bit(weights, quant_type="nf4")
        gap = float((functional.dequantize_4bit(packed, state) - weights).abs().max())
    except Exception as error:  # a missing library of the GPU shows as almost anything
        yield Finding("quantization", "NF4", "warning", f"bitsandbytes fails on the {device}: {error}", "no QLoRA here")
        return
    if gap < 0.25:
        yield Finding("quantization", "NF4", "ok", f"bitsandbytes works on the {device}")
    else:
        yield Finding("quantization", "NF4", "warning", f"wrong by {gap:.2f} on the {device}", "no QLoRA here")

"""GPUs, and NCCL between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptft_dist.doctor.finding import Finding

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """A CUDA device that this process sees."""

    name: str
    total: int
    """Bytes of memory."""
    free: int
    bf16: bool
    """It computes in bf16; older ones only imitate it, slowly."""


def visible_gpus() -> list[Gpu]:
    """The CUDA devices that PyTorch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found.append(Gpu(facts.name, total, free, bf16=facts.major >= 8))
    return found


def describe_gpus(gpus: Sequence[Gpu], *, driver: bool | None = None) -> Iterator[Finding]:
    """The GPUs, and what they lack. driver: an NVIDIA driver is there; None: look."""
    import torch

    if not gpus:
        if driver if driver is not None else Path("/dev/nvidia0").exists():
            text = f"the driver sees a GPU, but this PyTorch ({torch.__version__}) cannot use it"
            remedy = "install the CUDA build of torch; its CUDA must not be newer than the driver's (nvidia-smi)"
            yield Finding("GPUs", "CUDA", "error", text, remedy)
        else:
            yield Finding("GPUs", "CUDA", "absent", "no GPU: training runs on the CPU")
        return
    for number, gpu in enumerate(gpus):
        text = f"{gpu.name}, {gpu.free / GB:.1f} of {gpu.total / GB:.1f} GB free"
        if gpu.free < 0.9 * gpu.total:
            yield Finding("GPUs", f"GPU {number}", "warning", text, "other processes use it: see nvidia-smi")
        else:
            yield Finding("GPUs", f"GPU {number}", "ok", text)
    if not all(gpu.bf16 for gpu in gpus):
        yield Finding("GPUs", "bf16", "warning", "computed slowly by this kind of GPU", "use train.precision: fp16")
    if len({gpu.name for gpu in gpus}) > 1:
        remedy = "all processes wait for the slowest one; choose equal GPUs with CUDA_VISIBLE_DEVICES"
        yield Finding("GPUs", "kinds", "warning", "GPUs of several kinds", remedy)


def nccl(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """NCCL's version, variables that slow it down, and whether GPUs reach each other's memory directly."""
    if not gpus:
        return
    import torch

    yield Finding("NCCL", "version", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"):
        if os.environ.get(name, "0") not in ("", "0"):
            yield Finding(
                "NCCL", name, "warning", f"{name}={os.environ[name]} makes communication slower", f"unset {name}"
            )
    pairs = [(a, b) for a in range(len(gpus)) for b in range(len(gpus)) if a != b]
    if pairs:
        direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        text = f"{direct} of {len(pairs)} pairs of GPUs reach each other's memory directly"
        yield Finding("NCCL", "peers", "ok" if direct == len(pairs) else "warning", text)

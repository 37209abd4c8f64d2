"""What of this machine matters for training, and what is wrong with it: `ptft doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ptft_dist.doctor.finding import Finding
from ptft_dist.doctor.gpus import Gpu, describe_gpus, nccl, visible_gpus
from ptft_dist.doctor.handshake import shake_hands
from ptft_dist.doctor.launches import launches
from ptft_dist.doctor.places import network, places, slurm
from ptft_dist.doctor.software import deepspeed_operations, packages, quantization

__all__ = ["Finding", "Gpu", "examine"]


def examine(folder: Path, *, handshake: bool = True) -> Iterator[Finding]:
    """All findings, one by one, because some take seconds. Nothing is left behind.

    Args:
        folder: where runs would be written.
        handshake: also let two processes meet, about 10 seconds.
    """
    yield from packages()
    gpus = visible_gpus()
    yield from describe_gpus(gpus)
    yield from nccl(gpus)
    yield from places(folder)
    yield from network()
    yield from slurm()
    operations = list(deepspeed_operations(with_gpu=bool(gpus)))
    yield from operations
    yield from quantization()
    yield from launches(len(gpus), {each.name for each in operations if each.level == "warning"})
    if handshake:
        yield from shake_hands(len(gpus))

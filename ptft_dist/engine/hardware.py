"""Peak FLOP/s of the hardware, for the model FLOPs utilization (MFU)."""

from __future__ import annotations

import os
import time

import torch

# Dense peak FLOP/s from the vendors' datasheets: part of the device's name -> {precision: peak}.
# fp32 is the rate without TF32, because PyTorch uses TF32 only on request.
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "fp32": 80e12},
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100 PCIe": {"bf16": 756e12, "fp16": 756e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12},
    "A10": {"bf16": 125e12, "fp16": 125e12, "fp32": 31.2e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "T4": {"fp16": 65e12, "fp32": 8.1e12},
}


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of this device: from the datasheet, on a CPU measured with a matrix product; 0 if unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((rates for part, rates in PEAKS.items() if part in name), {})
        return known.get(precision, 0.0)
    return measure_matmul_flops() if device.type == "cpu" and precision == "fp32" else 0.0


def measure_matmul_flops(size: int = 512, repeats: int = 4) -> float:
    """The FLOP/s of the fastest of a few fp32 matrix products, with this process's threads. Takes about 0.02 s."""
    a = torch.ones(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def local_device(local_rank: int) -> torch.device:
    """The device that this rank will use, before its engine exists."""
    on_cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)

"""Imported last by the server that forks the tests' processes: everything that each process would otherwise build."""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
from pathlib import Path

import torch
from deepspeed.utils import nvtx
from rehearsal import rehearse
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ptft_dist.engine import hardware
from ptft_dist.reporting.run_files import PACKAGES
from ptft_dist.tasks.registry import recipe_class

HUGE_PAGE = 2 << 20
MADV_COLLAPSE = 25  # madvise(2)


def use_huge_pages() -> None:
    """Move this process's memory into huge pages. A fork copies a table of pages: with huge ones it costs a third.

    Linux before 6.1 cannot, and leaves the memory as it is.
    """
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, mode, _, _, inode, *name = line.split()
        if mode != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
            continue
        first, last = (int(address, 16) for address in place.split("-"))
        first, last = -(-first // HUGE_PAGE) * HUGE_PAGE, last // HUGE_PAGE * HUGE_PAGE
        if first < last:
            libc.madvise(first, last - first, MADV_COLLAPSE)


recipe_class().model_rebuild()
for package in PACKAGES:
    importlib.metadata.version(package), importlib.metadata.metadata(package)  # kept by versions_once.py
get_checkpoint_conversion_mapping("llama")  # compiles hundreds of regular expressions, needed by every export
torch.set_num_threads(1)  # a process with more of them cannot be forked
hardware.measure_matmul_flops = functools.cache(hardware.measure_matmul_flops)
hardware.measure_matmul_flops()
nvtx.enable_nvtx = False  # marks for a profiler of GPUs
rehearse()
use_huge_pages()
gc.freeze()
gc.enable()  # disabled by versions_once.py

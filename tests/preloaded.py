"""Imported last by the server that forks the tests' processes: everything that each process would otherwise build."""

from __future__ import annotations

import functools
import gc
import importlib.metadata

import torch
from deepspeed.utils import nvtx
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ptft_dist.cli import command
from ptft_dist.engine import hardware
from ptft_dist.reporting.run_files import PACKAGES
from ptft_dist.tasks.registry import recipe_class

recipe_class()
command()
for package in PACKAGES:
    importlib.metadata.version(package)  # kept by versions_once.py
get_checkpoint_conversion_mapping("llama")  # compiles hundreds of regular expressions, needed by every export
torch.set_num_threads(1)  # a process with more of them cannot be forked
hardware.measure_matmul_flops = functools.cache(hardware.measure_matmul_flops)
hardware.measure_matmul_flops()
nvtx.enable_nvtx = False  # marks for a profiler of GPUs
gc.freeze()
gc.enable()  # disabled by versions_once.py

"""Imported last by the server that forks the tests' processes: everything that each process would otherwise build."""

from __future__ import annotations

import gc
import importlib.metadata

from deepspeed.utils import nvtx
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ptft_dist.cli import command
from ptft_dist.reporting.run_files import PACKAGES
from ptft_dist.tasks.registry import recipe_class

recipe_class()
command()
for package in PACKAGES:
    importlib.metadata.version(package)  # kept by versions_once.py
get_checkpoint_conversion_mapping("llama")  # compiles hundreds of regular expressions, needed by every export
nvtx.enable_nvtx = False  # marks for a profiler of GPUs
gc.freeze()
gc.enable()  # disabled by versions_once.py

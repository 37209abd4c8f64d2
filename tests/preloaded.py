"""Imported once by the server that forks the tests' processes: everything that each process would otherwise build."""

from __future__ import annotations

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from ptft_dist.tasks.registry import recipe_class

recipe_class()
get_checkpoint_conversion_mapping("llama")  # compiles hundreds of regular expressions, needed by every export

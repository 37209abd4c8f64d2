"""The final weights as a plain Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase


class Writer(Protocol):
    """What export asks of the engine."""

    is_main: bool

    def barrier(self) -> None: ...
    def save_pretrained(self, folder: Path) -> None: ...


def export(engine: Writer, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the engine's present weights, under another name until the directory is whole. All ranks call it."""
    partial, old = target.with_name("model.partial"), target.with_name("model.old")
    if engine.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    engine.barrier()
    engine.save_pretrained(partial)
    if engine.is_main:
        tokenizer.save_pretrained(partial)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)

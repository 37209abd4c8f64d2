"""The final weights as a plain Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ptft_dist.checkpoint.checkpoint import read_checkpoint, verify
from ptft_dist.config.recipe import Recipe
from ptft_dist.engine import Engine
from ptft_dist.errors import CheckpointError
from ptft_dist.training.trainer import Trainer


def export(recipe: Recipe, engine: Engine, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the chosen weights as a Hugging Face directory, under another name until it is whole."""
    progress = trainer.progress
    if recipe.save.export == "best" and progress.best_step not in (None, progress.step):
        best = read_checkpoint(trainer.checkpoints.folder / f"step-{progress.best_step:08d}")
        problems = verify(best, engine)
        if problems:
            raise CheckpointError("the best checkpoint is damaged: " + "; ".join(problems))
        engine.load_state(best.path)
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

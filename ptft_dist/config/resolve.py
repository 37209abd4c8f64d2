"""Computes the batch of each process from recipe and number of processes, including gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from ptft_dist.config.consistency import nearest_divisor
from ptft_dist.config.recipe import Recipe
from ptft_dist.errors import RecipeError


@dataclass(frozen=True)
class BatchShape:
    """The sizes of one optimizer update."""

    global_size: int | None
    """Rows of an update over all processes; None: as many as fit into global_tokens."""
    global_tokens: int | None
    micro_size: int | None
    """Rows of one forward pass of one process."""
    micro_tokens: int | None
    accumulation: int
    """Micro-batches of each process in one update."""

    def largest_micro_batch(self, max_length: int) -> int:
        """Rows of the largest forward pass, if all rows have max_length tokens."""
        return self.micro_size or max(1, (self.micro_tokens or max_length) // max_length)


def batch_shape(recipe: Recipe, world_size: int) -> BatchShape:
    """Divide an update over `world_size` processes. Raises RecipeError, with the nearest valid sizes."""
    batch, max_length = recipe.batch, recipe.longest_row
    global_size, global_tokens, micro_size = batch.global_size, batch.global_tokens, batch.micro_size
    if global_tokens is not None and recipe.settings.full_rows:
        global_size, global_tokens = global_tokens // max_length, None
    if micro_size is not None and global_size is not None and global_size % (world_size * micro_size):
        raise RecipeError(_does_not_divide(global_size, micro_size, world_size))
    tokens = global_tokens or (global_size or 0) * max_length
    per_pass = world_size * (micro_size * max_length if micro_size is not None else batch.micro_tokens or max_length)
    return BatchShape(global_size, global_tokens, micro_size, batch.micro_tokens, max(1, -(-tokens // per_pass)))


def _does_not_divide(global_size: int, micro_size: int, world_size: int) -> str:
    unit = world_size * micro_size
    low = global_size // unit * unit
    sizes = " or ".join(str(n) for n in (low, low + unit) if n)
    message = (
        f"batch.global_size: {global_size} rows cannot be divided over {world_size} processes x micro-batches of "
        f"{micro_size}; set batch.global_size to {sizes}"
    )
    if global_size % world_size == 0:
        message += f", or batch.micro_size to {nearest_divisor(global_size // world_size, micro_size)}"
    return message

"""What follows from a recipe and a number of processes: accumulation, and whether the batch can be divided at all."""

from __future__ import annotations

from dataclasses import dataclass

from ptft_dist.config.recipe import Recipe
from ptft_dist.errors import RecipeError


@dataclass(frozen=True)
class BatchShape:
    """global_size: rows of an update (None: as many as hold global_tokens); accumulation: micro-batches of a rank."""

    global_size: int | None
    global_tokens: int | None
    micro_size: int | None
    micro_tokens: int | None
    accumulation: int

    def largest_micro_batch(self, max_length: int) -> int:
        """Rows of the largest forward pass, if all rows have max_length tokens."""
        return self.micro_size or max(1, (self.micro_tokens or max_length) // max_length)


def batch_shape(recipe: Recipe, world_size: int) -> BatchShape:
    """Divide one update over `world_size` processes. Raises RecipeError with the nearest sizes that divide."""
    batch, max_length = recipe.batch, recipe.data.max_length
    global_size, global_tokens = batch.global_size, batch.global_tokens
    if global_tokens is not None and global_tokens < max_length:
        raise RecipeError(f"batch.global_tokens: {global_tokens} is less than one row (data.max_length {max_length})")
    if global_tokens is not None and recipe.settings.full_rows:
        global_size, global_tokens = global_tokens // max_length, None
    micro_size = batch.micro_size
    if batch.micro_tokens is not None and batch.micro_tokens < max_length:
        raise RecipeError(f"batch.micro_tokens: {batch.micro_tokens} is less than data.max_length ({max_length})")
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
        share = global_size // world_size
        near = min((n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - micro_size))
        message += f", or batch.micro_size to {near}"
    return message

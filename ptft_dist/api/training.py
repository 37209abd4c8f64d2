"""Training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptft_dist.api.calls import Overrides, Source, hiding_secrets
from ptft_dist.api.recipes import load_recipe

if TYPE_CHECKING:
    from ptft_dist.run import Result


@hiding_secrets
def train(
    source: Source, overrides: Overrides = (), *, resume: str = "auto", accept: Sequence[str] = (), quiet: bool = False
) -> Result:
    """Train a recipe in this process: as the only process, or as one rank of those that a launcher started.

    Args:
        resume: `auto`: resume from the newest valid checkpoint of run_dir; `never`: start from zero; or the path of a
            checkpoint.
        accept: recipe keys that are meant to differ from the checkpoint.
        quiet: show warnings only.

    Raises:
        PtftError: one of the errors in ptft_dist.errors; the message says what to do.
    """
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages
    from ptft_dist.run import run

    loaded, here = load_recipe(source, overrides, training=True), place()
    with messages(here.rank, quiet=quiet):
        return run(loaded, here, resume=resume, accept=accept)

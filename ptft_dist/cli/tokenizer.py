"""`ptft tokenizer`: train and measure a recipe's tokenizer without preparing its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tokenizer(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.validation=0.05.")] = None,
    out: Annotated[Path | None, typer.Option(help="The target directory. Default: RUN_DIR/tokenizer.")] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="A directory or Hub name of another tokenizer to measure; repeatable.")
    ] = None,
) -> None:
    """Train the tokenizer of a recipe as `ptft prepare` does, and write it to a directory, with a report beside it.

    Other recipes use it with tokenizer.path. A directory that has it already is not changed. A recipe that takes a
    tokenizer as it is gets the report only.
    """
    from ptft_dist import api
    from ptft_dist.data.trained_tokenizer import describe

    print(describe(api.train_tokenizer(recipe, overrides or [], out=out, compare=compare or ())))

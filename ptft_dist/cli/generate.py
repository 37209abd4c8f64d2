"""`ptft generate`: generate text with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="A run directory, a model directory, or an adapter directory.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: greedy decoding.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")]
Adapters = Annotated[
    list[str] | None, typer.Option(metavar="NAME=DIR", help="An adapter on the same base (repeatable).")
]
Use = Annotated[str | None, typer.Option(help="The name of the active adapter. Default: the last one.")]


def generate(
    run: Run,
    prompt: Annotated[str, typer.Option(help="A text to continue, a message to answer, or a source.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    raw: Annotated[
        bool | None,
        typer.Option("--raw/--chat", help="Continue the prompt itself, or answer it. Default: as the run was trained."),
    ] = None,
    adapter: Adapters = None,
    use: Use = None,
) -> None:
    """Generate text with the final model of a run: continue a text, answer a message, or rewrite a source.

    With --adapter, RUN is the base of the adapters, or has an adapter on the same base, which is called `default`.
    """
    from ptft_dist import api

    text = api.generate(
        run,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        raw=raw,
        adapters=named_adapters(adapter or ()),
        use=use,
    )
    print(text)


def named_adapters(options: Sequence[str]) -> dict[str, str | Path]:
    """The directories of `--adapter NAME=DIR` by name. Raises RecipeError."""
    from ptft_dist.errors import RecipeError

    found: dict[str, str | Path] = {}
    for given in options:
        name, separator, path = given.partition("=")
        if not (name and separator and path) or name in found:
            raise RecipeError(f"--adapter {given}: expected NAME=DIR, each NAME once, as in --adapter french=runs/fr")
        found[name] = path
    return found

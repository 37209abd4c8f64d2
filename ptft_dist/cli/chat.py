"""`ptft chat`: talk with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ptft_dist.cli.generate import named_adapters

NEW = "/new"


def chat(
    run: Annotated[Path, typer.Argument(help="A run directory, a model directory, or an adapter directory.")],
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy decoding.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed and messages give the same answers.")] = 0,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="An adapter on the same base (repeatable).")
    ] = None,
    use: Annotated[str | None, typer.Option(help="The name of the active adapter. Default: the last one.")] = None,
) -> None:
    """Talk with the final model of a run, which reads all messages before.

    /new begins another conversation, Ctrl-C ends an answer, Ctrl-D the command. Messages can also come from a pipe, one
    in each line; the first error ends them.
    """
    from ptft_dist import api
    from ptft_dist.errors import RecipeError
    from ptft_dist.reporting.messages import fail, say

    conversation = api.chat(
        run,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        adapters=named_adapters(adapter or ()),
        use=use,
    )
    live = sys.stdin.isatty()
    for message in _messages(live=live):
        if message == NEW:
            conversation.restart()
            continue
        try:
            conversation.answer(message, show=_show)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            say("interrupted: the message and its answer are forgotten")
        except RecipeError as error:
            if not live:
                raise
            fail(f"error: {error}")


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _messages(*, live: bool) -> Iterator[str]:
    """What the user types, or the lines of a pipe; without empty lines."""
    if live:
        import readline  # noqa: F401  # `input` then has a history
    while True:
        try:
            line = input("> " if live else "")
        except EOFError:
            if live:
                print()
            return
        if line.strip():
            yield line.strip()

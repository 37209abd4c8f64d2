"""`ptft chat`: talk with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ptft_dist.cli.generate import Adapters, Run, Temperature, TopP, Use, named_adapters

NEW = "/new"


def chat(
    run: Run,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed and messages give the same answers.")] = 0,
    adapter: Adapters = None,
    use: Use = None,
) -> None:
    """Chat with the final model of a run. Each answer is generated from the whole chat.

    /new starts a new chat. Ctrl-C interrupts an answer, which then is not part of the chat; Ctrl-D ends the command.
    Messages can also come from a pipe, one per line; an error then ends the command.
    """
    from ptft_dist import api
    from ptft_dist.errors import RecipeError
    from ptft_dist.reporting.messages import fail, say

    session = api.chat(
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
            session.restart()
            continue
        try:
            session.answer(message, show=_show)
            print(flush=True)
        except KeyboardInterrupt:
            print(flush=True)
            say("interrupted: the message and its answer are not part of the chat")
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

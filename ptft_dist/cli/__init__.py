"""The `ptft` command. Each command is a small module that imports slow libraries only when it runs."""

from __future__ import annotations

import errno
import functools
import gc
import os
import select
import sys
import traceback
from importlib import import_module
from typing import Annotated

# Pydantic looks for plugins in the metadata of all installed packages, which is a tenth of a short command's time.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from ptft_dist import __version__
from ptft_dist.config.secrets import hide, hide_in_libraries
from ptft_dist.errors import PtftError, RecipeError, exit_code_of
from ptft_dist.reporting.messages import show_messages

# name, module, function (or a Typer app with subcommands)
VERBS: tuple[tuple[str, str, str], ...] = (
    ("init", "ptft_dist.cli.init", "init"),
    ("doctor", "ptft_dist.cli.doctor", "doctor"),
    ("train", "ptft_dist.cli.train", "train"),
    ("prepare", "ptft_dist.cli.prepare", "prepare"),
    ("data", "ptft_dist.cli.data", "app"),
    ("tokenizer", "ptft_dist.cli.tokenizer", "tokenizer"),
    ("prefetch", "ptft_dist.cli.prefetch", "prefetch"),
    ("config", "ptft_dist.cli.config", "app"),
    ("convert", "ptft_dist.cli.convert", "convert"),
    ("checkpoints", "ptft_dist.cli.checkpoints", "checkpoints"),
    ("tensorboard", "ptft_dist.cli.tensorboard", "tensorboard"),
    ("generate", "ptft_dist.cli.generate", "generate"),
    ("chat", "ptft_dist.cli.chat", "chat"),
    ("evaluate", "ptft_dist.cli.evaluate", "evaluate"),
    ("predict", "ptft_dist.cli.predict", "predict"),
    ("report", "ptft_dist.cli.report", "report"),
    ("compare", "ptft_dist.cli.compare", "compare"),
    ("score", "ptft_dist.cli.score", "score"),
    ("merge", "ptft_dist.cli.merge", "merge"),
    ("export", "ptft_dist.cli.export", "export"),
    ("submit", "ptft_dist.cli.submit", "submit"),
    ("status", "ptft_dist.cli.submit", "status"),
    ("logs", "ptft_dist.cli.submit", "logs"),
    ("cancel", "ptft_dist.cli.submit", "cancel"),
    ("folds", "ptft_dist.cli.folds", "folds"),
    ("sweep", "ptft_dist.cli.sweep", "sweep"),
    ("pipeline", "ptft_dist.cli.pipeline", "pipeline"),
    ("requeue", "ptft_dist.cli.requeue", "requeue"),
)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Distributed pretraining and fine-tuning of language models: one recipe, from one CPU to many nodes."""
    if version:
        print(f"ptft {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


_SHORT = ("init", "convert", "config", "submit", "status", "cancel", "requeue")
"""Verbs that end after a moment."""


@functools.cache
def command(verb: str | None = None) -> typer._click.core.Command:
    """The command with all verbs and their options, built from the functions' signatures.

    verb: only this one, because all of them take a tenth of a second.
    """
    # Rich markup is slow to import and wraps lines. Tracebacks of Typer print local variables: secrets, maybe.
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"max_content_width": 120},
    )
    app.callback(invoke_without_command=True)(_root)
    for name, module, attribute in VERBS:
        if verb not in (None, name):
            continue
        function = getattr(import_module(module), attribute)
        if isinstance(function, typer.Typer):
            app.add_typer(function, name=name)
        else:
            app.command(name)(function)
    return typer.main.get_command(app)


_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)  # any verb may meet one at any path
_EXIT_READER_GONE = 128 + 13  # the exit status in a shell of a process that was ended by SIGPIPE


def main() -> None:
    """Run the command line. Errors that a user can cause become one message and an exit code.

    All other errors keep their traceback. Typer's runner is not used, because it exits silently on EOFError and broken
    pipes, which in a training run can have causes other than the terminal.
    """
    show_messages(int(os.environ.get("RANK", "0")))  # the launch package would import the schema of recipes
    hide_in_libraries()
    try:
        words = sys.argv[1:]
        verb = words[0] if words and words[0] in {name for name, *_ in VERBS} else None
        if verb in _SHORT:
            gc.disable()  # imports make many objects and no garbage: this is a tenth of the time
        with command(verb).make_context("ptft", words) as context:
            context.command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as end:
        _reader_is_gone()  # the command has finished its work
        sys.exit(end.exit_code)
    except PtftError as error:
        print(hide(f"error: {error}"), file=sys.stderr)
        sys.exit(exit_code_of(error))
    except typer.TyperException as error:
        print(
            hide(f"error: {error.format_message()}{_hint(error, words)}\nSee `ptft --help` and `ptft VERB --help`."),
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # like the interpreter, but with secrets masked in the traceback
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            sys.exit(_EXIT_READER_GONE)
        if isinstance(error, OSError) and error.errno in _DENIED and error.filename is not None:
            denied = f"error: {error.filename}: {error.strerror}. Change its owner or its mode, or name another path"
            print(hide(denied), file=sys.stderr)
            sys.exit(RecipeError.exit_code)
        print(hide(traceback.format_exc()), end="", file=sys.stderr)
        sys.exit(exit_code_of(error))


def _hint(error: Exception, words: list[str]) -> str:
    """For an unknown option of a verb that takes keys of a recipe: the key."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    takes_keys = context is not None and any(each.name in ("overrides", "words") for each in context.command.params)
    if not takes_keys or type(error).__name__ != "NoSuchOption":
        return ""
    from ptft_dist.cli.unknown_option import hint

    return hint(str(option), words)


def _reader_is_gone() -> bool:
    """Whether the reader of stdout has ended, as in `| head`. Further output is then discarded."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:  # the interpreter flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone

"""docs/reference/commands.md: every verb with its arguments and options, from the command line's own definition."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, get_args

from ptft_dist.cli import VERBS, command
from reference_pages.markdown import sentence, table

_HEAD = """# Command reference

Every verb of `ptft`, made from the command line itself (`make reference`). `ptft VERB --help` prints the same.
[Exit codes](../errors.md#exit-codes) are the same for all verbs.
"""
_TYPES = {str: "text", int: "whole number", float: "number", bool: "switch"}


def commands_page() -> str:
    """The page: one section for each verb."""
    group: Any = command()
    verbs = {name: group.commands[name] for name, _, _ in VERBS}
    rows = [[f"[{name}](#ptft-{name})", sentence(_help(verb).partition("\n\n")[0])] for name, verb in verbs.items()]
    return "\n".join([_HEAD, table(["verb", "does"], rows), *_sections("ptft", verbs)])


def _sections(before: str, verbs: dict[str, Any]) -> Iterator[str]:
    for name, verb in verbs.items():
        full = f"{before} {name}"
        yield f"{'##' if before == 'ptft' else '###'} {full}\n"
        yield _help(verb) + "\n"
        if hasattr(verb, "commands"):
            yield from _sections(full, verb.commands)
            continue
        shown = [each for each in verb.params if not getattr(each, "hidden", False)]
        arguments = [each for each in shown if each.param_type_name == "argument"]
        yield f"    {full} {' '.join(map(_argument, arguments))} [OPTIONS]\n"
        rows = [[_names(each), _type(each), _default(each), sentence(each.help or "")] for each in shown]
        yield table(["argument or option", "type", "default", "meaning"], rows)


def _help(verb: Any) -> str:
    """The docstring of a verb: paragraphs without line ends."""
    paragraphs = (verb.help or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def _argument(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    if argument.nargs == -1 and "..." not in name:
        name += "..."
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_argument(parameter)}`"
    return ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])


def _type(parameter: Any) -> str:
    annotation = parameter.type_descriptor.annotation
    inner = [each for each in get_args(annotation) if each is not type(None)]
    word = next((_TYPES[each] for each in (annotation, *inner) if each in _TYPES), "text")
    bounds = [f"at least {parameter.min}" if parameter.min is not None else ""]
    bounds += [f"at most {parameter.max}" if parameter.max is not None else ""]
    words = ", ".join(filter(None, [word, *bounds]))
    return f"{words}; repeatable" if parameter.multiple or parameter.nargs == -1 else words


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    if getattr(parameter, "is_flag", False):
        return "off" if not parameter.default else "on"
    return "" if parameter.default in (None, (), []) else f"`{shlex.quote(str(parameter.default))}`"

"""The hint for an unknown option that is a key of recipes, or the name of another trainer for one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

_MOST = 3
_VALUE = "VALUE"


def hint(option: str, words: Sequence[str]) -> str:
    """How a recipe's key is given, such as optim.lr=1e-4 for --learning_rate 1e-4; empty if there is none.

    words: the command line.
    """
    from ptft_dist.config.mistakes import schema_of
    from ptft_dist.config.other_trainers import foreign_name
    from ptft_dist.tasks.registry import recipe_class

    schema, name = schema_of(recipe_class()), option.lstrip("-").replace("-", "_")
    found = foreign_name(option)
    paths = [path for path in schema.all_keys if name in (path[-1], ".".join(map(str, path)))]
    if found is not None and found.keys:
        paths = [tuple(key.split(".")) for key in found.keys]
    elif not paths:
        return "" if found is None else f". There is no counterpart in a recipe. {found.note}"
    value = shlex.quote(_value_of(option, words))
    keys = [".".join(map(str, schema.in_first_item(path))) for path in paths[:_MOST]]
    note = f". {found.note}" if found is not None and found.note else ""
    return f". Keys of the recipe are given as KEY=VALUE: {' or '.join(f'{key}={value}' for key in keys)}{note}"


def _value_of(option: str, words: Sequence[str]) -> str:
    """The value that the option was given."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, separator, value = word.partition("=")
        if name == option:
            value = value if separator else following
            return value if value and not value.startswith("--") else _VALUE
    return _VALUE

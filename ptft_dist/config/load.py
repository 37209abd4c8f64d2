"""Loads a recipe file with `key=value` overrides into a validated Recipe, or raises one error with all mistakes."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from ptft_dist.config.document import COMMAND_LINE, Document, Mistake, Written, leaves, put
from ptft_dist.config.mistakes import explain, schema_of
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.references import default_of, resolve
from ptft_dist.config.secrets import hide
from ptft_dist.config.section import KeyPath, Section, dotted
from ptft_dist.config.shipped import find_shipped
from ptft_dist.errors import RecipeError

DICTIONARY = Path("recipe")
"""The path shown for a recipe that was given as a dictionary."""
_STARTS_AT = "Its relative data paths start at "
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
"""Characters that JSON may contain, and that YAML refuses or reads as the end of a line."""
_NEXT_LINE = "\x85"
_S = TypeVar("_S", bound=Section)
_OF_THIS_MACHINE = {"run_dir": None, "log": None, "data": ("cache_dir", "workers")}
"""Keys of the recipe that say nothing about the model."""


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, and the origin of each of its values."""

    recipe: Recipe
    path: Path
    """The recipe file; DICTIONARY for a dictionary."""
    base: Path
    """The directory where relative data paths start: that of the recipe; the current directory for a dictionary."""
    origins: Mapping[str, str]
    """The origin of every dotted key: `recipe.yaml:12`, `command line`, `env NAME (recipe.yaml:12)` or `default`."""
    text: str
    """The contents of the file, unchanged; a dictionary as JSON."""
    written: Mapping[KeyPath, Written]
    """What is shown of texts with references to the environment."""

    @cached_property
    def resolved(self) -> str:
        """The complete recipe as YAML, defaults included. Loading it gives an equal recipe."""
        return f"# All values of a recipe. {starts_at(self)}\n{to_yaml(public_values(self))}"


def read_recipe(source: str | Mapping[str, Any], overrides: Sequence[str], schema: type[Recipe]) -> Loaded:
    """Read, override and validate a recipe.

    Args:
        source: a file, the name of a shipped recipe, or the contents as nested dictionaries.
        overrides: `section.key=value`, with a YAML value.
        schema: `ptft_dist.tasks.registry.recipe_class()`.

    Raises:
        RecipeError: the recipe is invalid. The message lists all mistakes with file, line and key.
    """
    if isinstance(source, str):
        path = find_shipped("recipes", source, ".yaml")
        text = _read(path)
    else:
        path, text = DICTIONARY, as_json(dict(source), indent=1)
    document = _document(text, path, schema, "recipe")
    for assignment in overrides:
        document.override(assignment)
    resolve(document, os.environ, default_of(schema, lambda: [dotted(key) for key in schema_of(schema).all_keys]))
    document.check_leaves()
    recipe = _validate(document, path, schema)
    _take_from_model(document)
    return Loaded(recipe, path, _base(text, path), _origins(recipe, document, path), text, document.written)


def read_section(path: Path, schema: type[_S], what: str) -> tuple[_S, Document]:
    """Read a file that is not a recipe, such as a search: its values, and the document with their lines.

    Args:
        what: the name of such a file, for messages.

    Raises:
        RecipeError: the file is invalid. The message lists all mistakes with file, line and key.
    """
    document = _document(_read(path), path, schema, what)
    document.check_leaves()
    return _validate(document, path, schema), document


def _document(text: str, path: Path, schema: type[Section], what: str) -> Document:
    """The parsed text. Raises RecipeError if it is not a mapping."""
    document = Document()
    document.read(text)
    if document.values is None and document.mistakes:
        raise _refusal(document.mistakes, path)
    if not isinstance(document.values, dict):
        state = f"the {what} is empty" if document.values is None else f"a {what} consists of `key: value` lines"
        required = ", ".join(schema.model_json_schema()["required"])
        raise RecipeError(f"{_place(str(path), path, 1)}: {state}; its required keys: {required}")
    return document


def _base(text: str, path: Path) -> Path:
    """The directory where relative data paths start: as the first line says, or that of the file."""
    first, _, _ = text.partition("\n")
    _, found, base = first.partition(_STARTS_AT)
    if not found or not first.startswith("#"):
        return path.resolve().parent
    try:
        return Path(json.loads(base))
    except (ValueError, TypeError):
        raise RecipeError(
            f"{path}:1: {_STARTS_AT.strip()}: expected a directory in double quotes, or no such line"
        ) from None


def as_json(value: Any, indent: int | None = None) -> str:
    """A value of a dictionary as JSON, which is also YAML. Raises RecipeError if a recipe has no such values."""

    def plain(value: Any) -> str:
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"a value of the type {type(value).__name__} is not allowed")

    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, default=plain)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"recipe: {error}; use numbers, text, booleans, lists and dictionaries") from None
    return _NOT_IN_YAML.sub(lambda character: f"\\u{ord(character[0]):04x}", text)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text (byte {error.object[error.start]:#04x})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def _refusal(mistakes: Sequence[Mistake], path: Path) -> RecipeError:
    """One error with all mistakes, sorted by line; those of the command line come last."""
    lines = []
    for mistake in sorted(mistakes, key=lambda each: each.line or float("inf")):
        place = "command line" if mistake.line == COMMAND_LINE else _place(str(path), path, mistake.line)
        lines.append(": ".join(part for part in (place, dotted(mistake.path), mistake.text) if part))
    return RecipeError("\n".join(lines))


def _place(name: str, path: Path, line: int) -> str:
    """The place of a value: `file:line`; only the name for a dictionary, which has no lines."""
    return name if path is DICTIONARY else f"{name}:{line}"


def _validate(document: Document, path: Path, schema: type[_S]) -> _S:
    try:
        # In JSON mode, pydantic's strict validation accepts lists for tuples, but no text or 8.0 for integers.
        # errors="replace": invalid Unicode is already reported.
        text = json.dumps(document.values, ensure_ascii=False).encode(errors="replace")
        values = schema.model_validate_json(text, strict=True)
    except ValidationError as error:
        # `from None`, because the cause quotes values, which may be secret.
        raise _refusal([*document.mistakes, *explain(error, document, schema_of(schema))], path) from None
    if document.mistakes:
        raise _refusal(document.mistakes, path)
    return values


def _take_from_model(document: Document) -> None:
    """Copy lines and references of the model section to the tokenizer keys that default to it."""
    if document.values.get("tokenizer") is not None:
        return
    for key in ("path", "revision", "trust_remote_code"):
        if ("model", key) in document.lines:
            document.lines["tokenizer", key] = document.lines["model", key]
        if ("model", key) in document.written:
            document.written["tokenizer", key] = document.written["model", key]


def _origins(recipe: Recipe, document: Document, path: Path) -> dict[str, str]:
    """The origin of each value by its dotted key, see `Loaded.origins`."""
    origins = {}
    for key, _ in leaves(recipe.own_values()):
        if key not in document.lines:
            origins[dotted(key)] = "default"
            continue
        line = document.lines[key]
        place = "command line" if line == COMMAND_LINE else _place(path.name, path, line)
        variables = document.written[key].variables if key in document.written else ()
        origins[dotted(key)] = f"env {', '.join(variables)} ({place})" if variables else place
    return origins


def public_values(loaded: Loaded) -> dict[str, Any]:
    """All values of the recipe with references as written, because the values that they refer to may be secret."""
    values = loaded.recipe.own_values()
    for path, written in loaded.written.items():
        put(values, path, written.text)
    return values


def given_values(loaded: Loaded) -> dict[str, Any]:
    """The values that are not defaults, with references as written, without keys of this machine such as run_dir."""
    changed = loaded.recipe.model_dump(mode="json", exclude_defaults=True)
    values: dict[str, Any] = _pruned(public_values(loaded), changed)
    for section, keys in _OF_THIS_MACHINE.items():
        if keys is None:
            values.pop(section, None)
        else:
            for key in keys:
                values.get(section, {}).pop(key, None)
    return values


def _pruned(values: Any, kept: Any) -> Any:
    if isinstance(values, Mapping) and isinstance(kept, Mapping):
        return {key: _pruned(values[key], kept[key]) for key in values if key in kept}
    if isinstance(values, list | tuple) and isinstance(kept, list):
        return [_pruned(*pair) for pair in zip(values, kept, strict=True)]
    return values


def flat(values: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Nested values by dotted key; a list is JSON. Secrets are masked."""
    found: dict[str, bool | int | float | str | None] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in flat(value).items()}
        elif value is None or isinstance(value, bool | int | float):
            found[key] = value
        else:
            found[key] = hide(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return found


class _Representer(SafeRepresenter):
    """Quotes texts with NEL, which ends a line, so that it is escaped. ruamel.yaml escapes the other line ends."""

    def represent_str(self, data: str) -> Any:
        return self.represent_scalar("tag:yaml.org,2002:str", data, '"' if _NEXT_LINE in data else None)


_Representer.add_representer(str, _Representer.represent_str)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Nested values as YAML text, in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(dict(values), stream)
    return stream.getvalue()


def read_resolved(path: Path, schema: type[Recipe], overrides: Sequence[str] = ()) -> Loaded:
    """Read the file of `Loaded.resolved`. Raises RecipeError."""
    return read_recipe(str(path), overrides, schema)


def starts_at(loaded: Loaded) -> str:
    """A sentence for the end of the first line of a file: there `read_recipe` finds where relative data paths start."""
    return _STARTS_AT + json.dumps(str(loaded.base))  # JSON escapes line breaks in the directory's name


def edited(text: str, overrides: Sequence[str]) -> str:
    """The text of a recipe with values set by `key=value`; comments, order and quotes of the others are kept."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    document = Document(values=yaml.load(text))
    for assignment in overrides:
        document.override(assignment)
    if document.mistakes:
        raise _refusal(document.mistakes, DICTIONARY)
    stream = io.StringIO()
    yaml.dump(document.values, stream)
    return stream.getvalue()


def describe(loaded: Loaded, *, all_tasks: bool = False) -> str:
    """A readable table: key, value and origin of each value.

    all_tasks: also the sections of other tasks, which have their defaults.
    """
    others = loaded.recipe.model_dump(mode="json") if all_tasks else {}
    rows = [("key", "value", "from")]
    for path, value in leaves(others | public_values(loaded)):
        origin = loaded.origins.get(dotted(path), "default")
        rows.append((dotted(path), json.dumps(value, ensure_ascii=False), origin))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:{widths[0]}}  {value:{widths[1]}}  {origin}" for key, value, origin in rows)

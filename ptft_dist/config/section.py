"""Base class of all sections of a recipe, number ranges, and common checks."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class NamesModel:
    """Marks the type of a key that names a model: a local directory or a Hub name. Its revision is the key `revision`
    of the same section. See `ptft_dist.config.named_models`."""

    weights: bool = True
    """False if only the tokenizer is used."""


ModelName = Annotated[Text, NamesModel()]
TokenizerName = Annotated[Text, NamesModel(weights=False)]

Number = Annotated[Text, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
"""A key of a mapping that users write as a number, such as 0; it becomes the text `0`."""

KeyPath = tuple[str | int, ...]
"""The keys and list indices from the top of a recipe to a value."""


def dotted(path: KeyPath) -> str:
    """A path as text, such as `data.train.0.path`."""
    return ".".join(map(str, path))


class Problem(NamedTuple):
    """A problem with the value at `path`."""

    path: KeyPath
    text: str


class RecipeProblems(ValueError):
    """The problems of a recipe whose sections are valid individually."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{dotted(problem.path)}: {problem.text}" for problem in self.problems))


class Section(BaseModel):
    """A section of a recipe: immutable, without unknown keys. The docstring below a key is its documentation."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, protected_namespaces=())

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema with the documentation of each key. `use_attribute_docstrings` does the same whenever a class is
        defined, which takes a quarter of the time of a short command."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in documentation(cls).items():
            if name in properties:
                properties[name]["description"] = text
        return schema


@functools.cache
def documentation(section: type[BaseModel]) -> dict[str, str]:
    """The docstring below each key of a section, also of those that it inherits."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if not issubclass(base, Section) or "__pydantic_fields__" not in vars(base):
            continue
        try:
            source = inspect.getsource(base)
        except OSError:  # made by a function: its keys have descriptions of their own, or none
            continue
        (definition,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(definition, ast.ClassDef)
        for key, text in pairwise(definition.body):
            match key, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(documented))):
                    texts[name] = inspect.cleandoc(documented)
    return texts


def is_default(section: BaseModel, name: str) -> bool:
    """Whether a key of a section has its default value."""
    default = type(section).model_fields[name].get_default(call_default_factory=True, validated_data={})
    return bool(getattr(section, name) == default)


def exactly_one(section: BaseModel, *names: str) -> None:
    """Raise ValueError unless exactly one of these keys is given."""
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        state = "none is given" if not given else "given: " + ", ".join(given)
        raise ValueError(f"exactly one of {', '.join(names)} is needed; {state}")


def only_with(section: BaseModel, names: tuple[str, ...], condition: bool, needs: str) -> None:
    """Raise ValueError if a key of `names` is set although `condition` is false, because it would have no effect."""
    for name in names:
        if not condition and not is_default(section, name):
            raise ValueError(f"{name} has no effect here: it needs {needs}")

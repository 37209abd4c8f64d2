"""What all sections of a recipe share: strictness, number ranges, and the two commonest checks."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Text = Annotated[str, Field(min_length=1)]


def exactly_one(section: BaseModel, *names: str) -> None:
    given = [name for name in names if getattr(section, name) is not None]
    if len(given) != 1:
        found = "none is given" if not given else "given: " + ", ".join(given)
        raise ValueError(f"exactly one of {', '.join(names)} is needed; {found}")


def only_with(section: BaseModel, names: tuple[str, ...], condition: bool, needs: str) -> None:
    """A setting that would have no effect is an error."""
    for name in names:
        if (
            getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True)
            and not condition
        ):
            raise ValueError(f"{name} has no effect here: it needs {needs}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

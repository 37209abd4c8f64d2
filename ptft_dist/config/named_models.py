"""The models and tokenizers that a recipe names, found by the types of its keys. Does not import torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.section import KeyPath, NamesModel, dotted


@dataclass(frozen=True)
class NamedModel:
    """A model that a recipe names."""

    key: str
    """The dotted key; several keys are separated by commas."""
    name: str
    """A local directory or a Hub name, as written in the recipe."""
    revision: str | None
    weights: bool
    """False if only its tokenizer is used."""
    tokenizer: bool
    """A key such as tokenizer.path names it, so it must have a tokenizer."""


def named_models(recipe: Recipe) -> list[NamedModel]:
    """The models of the recipe, each name and revision once, in the order of the keys.

    A key whose type is `ModelName` or `TokenizerName` names one.
    """
    merged: dict[tuple[str, str | None], NamedModel] = {}
    for each in _in_section(recipe, ()):
        identity = (each.name, each.revision)
        if (same := merged.get(identity)) is None:
            merged[identity] = each
        else:
            merged[identity] = replace(
                same,
                key=f"{same.key}, {each.key}",
                weights=same.weights or each.weights,
                tokenizer=same.tokenizer or each.tokenizer,
            )
    return list(merged.values())


def _in_section(section: BaseModel, path: KeyPath) -> Iterator[NamedModel]:
    for key, marker in _markers(type(section)).items():
        value = getattr(section, key)
        if marker is not None and value is not None:
            revision = getattr(section, "revision", None)
            yield NamedModel(dotted((*path, key)), value, revision, marker.weights, not marker.weights)
        elif isinstance(value, BaseModel):
            yield from _in_section(value, (*path, key))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from _in_section(item, (*path, key, i))


@functools.cache
def _markers(section: type[BaseModel]) -> dict[str, NamesModel | None]:
    """Each key of a section, and what its type says of the model that it names."""
    return {
        key: _marker(field.annotation) or next((m for m in field.metadata if isinstance(m, NamesModel)), None)
        for key, field in section.model_fields.items()
    }


def _marker(annotation: Any) -> NamesModel | None:
    """The marker in an annotation such as `ModelName | None`."""
    inner = (*getattr(annotation, "__metadata__", ()), *get_args(annotation))
    for each in inner:
        found = each if isinstance(each, NamesModel) else _marker(each)
        if found is not None:
            return found
    return None

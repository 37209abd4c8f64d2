"""Names of labels that are stored as numbers: the ClassLabel features of the `datasets` library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class ClassId(int):
    """A number that stands for a class, with the name of the class. It is a number for tasks that need one."""

    name: str

    def __new__(cls, value: int, name: str = "") -> ClassId:
        made = super().__new__(cls, value)
        made.name = name
        return made


ClassNames = Mapping[str, Mapping[int, str]]
"""Column -> the names of its classes, by number."""


def of_features(features: Any) -> ClassNames:
    """The columns of a data set that have classes, or lists of them. features: `Features`, or None if unknown."""
    return {} if features is None else _of_dictionary(features.to_dict())


def of_parquet(metadata: Mapping[bytes, bytes] | None) -> ClassNames:
    """The same of the metadata that `datasets` writes to a Parquet file. Other metadata are ignored."""
    try:
        return _of_dictionary(json.loads((metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _of_dictionary(features: Mapping[str, Any]) -> ClassNames:
    found: dict[str, dict[int, str]] = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, Mapping) else None  # of a list
        if isinstance(inner, Mapping) and inner.get("_type") == "ClassLabel" and inner.get("names"):
            found[column] = dict(enumerate(inner["names"]))
    return found


def with_names(row: dict[str, Any], classes: ClassNames) -> dict[str, Any]:
    """The row with ClassIds for the numbers of `classes`. A number without a name, such as -1, stays as it is."""
    return row | {column: _named(row[column], names) for column, names in classes.items() if column in row}


def names_in(row: Mapping[str, Any]) -> ClassNames:
    """The names of the ClassIds in a row: `with_names` restores them after the row was written as JSON."""
    found: dict[str, dict[int, str]] = {}
    for column, value in row.items():
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, ClassId):
                found.setdefault(column, {})[int(each)] = each.name
    return found


def _named(value: Any, names: Mapping[int, str]) -> Any:
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    if isinstance(value, int) and not isinstance(value, bool) and value in names:
        return ClassId(value, names[value])
    return value

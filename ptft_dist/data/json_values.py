"""JSON in data files: valid JSON that cannot be used is refused with a reason; values that JSON does not have."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any


class _RepeatedKey(ValueError):
    """An object has two values for a key: which one is meant is unknown."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its keys and values. Raises _RepeatedKey."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def unusable(error: Exception) -> str:
    """Why this valid JSON is not used."""
    if isinstance(error, _RepeatedKey):
        return f"the key {str(error)!r} occurs twice in one object. Remove one of them, or rename it."
    if isinstance(error, RecursionError):
        return "the JSON is nested too deeply. Correct or remove the row."
    digits = sys.get_int_max_str_digits()
    return f"the JSON has a number with more than {digits:,} digits. Write it as text, or remove the row."


def not_json(values: Mapping[str, Any]) -> dict[str, str]:
    """The columns that JSON cannot hold, such as the dates, decimals and bytes of a Parquet file, and why."""
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        if len(values) == 1:
            return dict.fromkeys(values, str(error))
        return {name: why for name, value in values.items() for why in not_json({name: value}).values()}
    return {}

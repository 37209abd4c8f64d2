"""The identity of a run: everything that a checkpoint and the recipe that resumes it must have in common.

An identity is JSON, and part of every manifest:

    {"chosen":  {dotted key: value},    keys whose value is not the default
     "default": {dotted key: value},    keys at their default
     "data":    {"fingerprint": hash of the prepared rows, part or dotted key: its value}}

A key that only one of two versions of ptft has counts as being at its default in the other one. Versions up to 0.1
wrote {dotted key: value} with the sections of all tasks; such identities are read too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from ptft_dist.config.document import get
from ptft_dist.config.load import Loaded, public_values
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.section import Section, dotted

MAY_CHANGE = (
    "run_dir",
    "save",
    "eval",
    "log",
    "data.cache_dir",
    "data.workers",
    "data.train",  # the contents of the sources are compared instead of their paths
    "data.validation",
    "continual.ewc.data",
    "continual.replay.data",
    "tokenizer",
    "batch.micro_size",
    "batch.micro_tokens",
    "batch.group_by_length",
    "model.attention",
    "model.gradient_checkpointing",
    "model.compile",
    "train.deterministic",
    "train.offload_frozen",
)
"""Keys and sections that may change when a run is resumed: output, evaluation, and settings that do not change the
updates. `TaskSettings.may_change` adds those of the task. All other keys must be equal."""

MUST_STAY = ("tokenizer.init_added",)
"""Keys within the sections of MAY_CHANGE that must be equal. Embeddings that are not trained, and those of a reference,
are initialized again at each start."""

NEVER_ACCEPTED = ("optim.name",)
"""Keys that `--accept` cannot name, because the state of the optimizer has no meaning for another one."""

PREPARED_DATA = "prepared data"
"""The key for `--accept` if the prepared rows differ for an unknown reason."""

_ABSENT = object()


def run_identity(
    loaded: Loaded, fingerprint: str, data_parts: Mapping[str, Any], files: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The identity of the run that this recipe starts.

    Args:
        fingerprint: hash of the prepared rows.
        data_parts: the inputs of the rows besides the recipe's keys; see `Prepared.parts`.
        files: name -> hash of the files of a frozen network, such as a teacher.
    """
    values, defaults = _keys(loaded.recipe.own_values()), set(_keys_at_default(loaded.recipe))
    public = _keys(public_values(loaded))
    # The value of a reference may be secret, so its hash is written.
    shown = {key: value if public[key] == value else _hashed(public[key], value) for key, value in values.items()}
    kept = {key: value for key, value in shown.items() if not may_change(key, loaded.recipe)}
    of_rows = {key: kept.pop(key) for key in (f"{loaded.recipe.task}.{n}" for n in loaded.recipe.settings.only_rows)}
    return {
        "chosen": {key: value for key, value in kept.items() if key not in defaults} | dict(files or {}),
        "default": {key: value for key, value in kept.items() if key in defaults},
        "data": {"fingerprint": fingerprint, **_keys(dict(data_parts)), **of_rows},
    }


def may_change(key: str, recipe: Recipe) -> bool:
    """Whether a resumed run may have another value of this key."""
    of_task = (f"{recipe.task}.{name}" for name in recipe.settings.may_change)
    return key not in MUST_STAY and f"{key}.".startswith(tuple(f"{free}." for free in (*MAY_CHANGE, *of_task)))


def values_of_environment(loaded: Loaded) -> dict[str, str]:
    """The values from environment variables that must be equal at a resume, by dotted key: the text of the recipe, and
    a hash of the value, which may be secret."""
    named = {path: each.text for path, each in loaded.written.items() if each.variables}
    values = loaded.recipe.own_values()
    return {
        dotted(path): _hashed(text, get(values, path))
        for path, text in named.items()
        if not may_change(dotted(path), loaded.recipe)
    }


def all_keys(identity: Mapping[str, Any]) -> set[str]:
    """Every key that can differ between this identity and another one."""
    chosen, default, data = _read(identity)
    return {*chosen, *default, *(data.keys() - {"fingerprint"}), PREPARED_DATA}


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """The keys that differ, in alphabetical order, each with both values as text."""
    (saved_chosen, saved_default, saved_data), (chosen, default, data) = _read(saved), _read(current)
    if "default" not in saved:  # contains the sections of all other tasks, at their defaults
        sections = {key.partition(".")[0] for key in (*chosen, *default)}
        saved_chosen = {key: value for key, value in saved_chosen.items() if key.partition(".")[0] in sections}
    # Earlier versions wrote keys of the data among the other keys.
    saved_data = {key: value for key, value in (saved_default | saved_chosen).items() if key in data} | saved_data
    different: dict[str, str] = {}
    for key in (saved_chosen.keys() | saved_default.keys() | chosen.keys() | default.keys()) - data.keys():
        before = saved_chosen.get(key, saved_default.get(key, _ABSENT))
        now = chosen.get(key, default.get(key, _ABSENT))
        only_default = (before is _ABSENT and key in default) or (now is _ABSENT and key in saved_default)
        if before != now and not only_default:
            different[key] = f"{_shown(before)} in the checkpoint, {_shown(now)} now"
    if saved_data["fingerprint"] != data["fingerprint"]:
        different |= _data_differences(saved_data, data, different)
    return dict(sorted(different.items()))


def _data_differences(
    saved: Mapping[str, Any], data: Mapping[str, Any], different: Mapping[str, str]
) -> dict[str, str]:
    """Why the prepared rows differ. different: the recipe's keys that differ, which may be the reason."""
    parts = {key: _part_change(key, saved[key], data[key]) for key in saved.keys() & data.keys() - {"fingerprint"}}
    changed = {key: text for key, text in parts.items() if text}
    if changed or any(not key.startswith(("optim.", "batch.", "train.max_", "train.epochs")) for key in different):
        return changed
    return {
        PREPARED_DATA: "the rows differ: the sources, the tokenizer or a library changed, or the checkpoint was made "
        "by an earlier version of ptft, which prepared them differently"
    }


def _part_change(key: str, saved: Any, current: Any) -> str | None:
    """How one part of the prepared data has changed; None if it is equal."""
    if saved == current:
        return None
    if key == "tokenizer":
        return "another tokenizer"
    if not isinstance(saved, list) or not isinstance(current, list):
        return f"{_sources(saved)} in the checkpoint, {_sources(current)} now"
    if len(saved) != len(current):
        return f"{_sources(saved)} in the checkpoint, {_sources(current)} now"
    changed = [f"{key}[{i}]" for i, (one, other) in enumerate(zip(saved, current, strict=True)) if one != other]
    return f"other contents in {', '.join(changed)}"


def _sources(value: Any) -> str:
    """A value as text; a list of fingerprints as the number of sources."""
    if not isinstance(value, list):
        return _shown(value)
    return f"{len(value)} source{'s' * (len(value) != 1)}"


def _read(identity: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(chosen, default, data) of an identity of any version."""
    if "default" in identity:
        return identity["chosen"], identity["default"], identity["data"]
    flat = dict(identity)
    return flat, {}, {"fingerprint": flat.pop(PREPARED_DATA, None)}


def _keys(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted key: value}; lists are values."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _keys(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def _keys_at_default(section: Section, prefix: str = "") -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _keys_at_default(value, f"{prefix}{name}.")
        elif not field.is_required() and value == field.default:
            yield f"{prefix}{name}"


def _shown(value: Any) -> str:
    return "not set" if value is _ABSENT else repr(value)


def _hashed(written: Any, value: Any) -> str:
    return f"{written} (sha256 {hashlib.sha256(repr(value).encode()).hexdigest()[:12]})"

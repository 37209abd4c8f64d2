"""Data sets of other trainers as sources of a recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptft_dist.config.places import expanded
from ptft_dist.converting.draft import Draft, trainers
from ptft_dist.errors import RecipeError

Sourced = tuple[dict[str, Any], str]
"""A source, and the shape of its rows; empty if it is not known."""
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".conll", ".gz", ".zst")
_OWN_COLUMNS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
}


def sources(draft: Draft, value: Any) -> list[Sourced]:
    """The sources of a value of `datasets`, `dataset` or `eval_dataset`."""
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if draft.trainer == "llamafactory":
        return [_from_info(draft, str(name).strip()) for name in names]
    return [_from_entry(draft, {"path": each.strip()} if isinstance(each, str) else each) for each in names]


def located(draft: Draft, name: str) -> dict[str, Any]:
    """A path or the name of a Hub data set as a source. Existing relative paths become relative to the recipe."""
    path = expanded(name)
    found = next((each for each in (path, draft.path.parent / path) if each.exists()), None)
    if found is None:
        local = name.startswith((".", "/", "~")) or name.endswith(_SUFFIXES)
        return {"path": name} if local else {"hub": name}
    shown = found if path.is_absolute() else Path(os.path.relpath(found, draft.folder))
    if found.is_dir():
        kinds = {file.suffix for file in found.iterdir() if file.suffix in _SUFFIXES}
        shown /= f"*{kinds.pop() if len(kinds) == 1 else '.*'}"
    return {"path": str(shown)}


def _from_entry(draft: Draft, entry: dict[str, Any]) -> Sourced:
    """An entry of axolotl's or TRL's `datasets`."""
    files = entry.get("data_files")
    path = files[0] if isinstance(files, list) else files or entry.get("path")
    source = located(draft, str(path))
    if isinstance(files, list) and len(files) > 1:
        draft.remarks.append(f"data_files: only {files[0]} was taken; write one source for each file")
    if "hub" in source:
        renamed = {"name": "config", "split": "split", "revision": "revision"}
        source |= {ours: entry[theirs] for theirs, ours in renamed.items() if entry.get(theirs)}
    form = entry.get("type")
    own = form if isinstance(form, dict) else {}
    known = trainers()["types"].get(str(form).partition(":")[0], {})
    shape = known.get("shape", "")
    fields = dict(known.get("fields", {}))
    fields |= {role: own[name] for name, role in _OWN_COLUMNS.items() if own.get(name)}
    if own.get("format") or own.get("prompt_format"):
        draft.remarks.append(f"{path}: its own prompt format is not used; the chat template is")
    if shape == "messages":
        shape, fields = _messages(entry, fields)
    if "task" in known and known["task"] != draft.task and not shape:  # plain text among conversations
        shape = "text"
    if form is not None and not known and not own:
        draft.remarks.append(f"{path}: the type {form!r} is not known here; map its columns with fields")
    return _with_columns(draft, source, fields, entry.get("field")), shape


def _messages(entry: dict[str, Any], fields: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The shape and the columns of a `chat_template` data set."""
    properties = entry.get("message_property_mappings") or {}
    role = properties.get("role") or entry.get("message_field_role") or "role"
    shape, column = ("sharegpt", "conversations") if role == "from" else ("messages", "messages")
    given = entry.get("field_messages") or column
    return shape, {**fields, **({column: given} if given != column else {})}


def _with_columns(draft: Draft, source: dict[str, Any], fields: dict[str, str], text: Any) -> dict[str, Any]:
    """The source with its column mapping: `field` for tasks on documents, `fields` for the others."""
    rows = bool(draft.roles)
    if text and text != "text":
        source |= {"fields": {"text": text}} if rows else {"field": text}
    if fields and rows:
        source |= {"fields": {**source.get("fields", {}), **fields}}
    return source


def _from_info(draft: Draft, name: str) -> Sourced:
    """A data set of LLaMA-Factory, which dataset_info.json describes."""
    folder = Path(str(draft.own("dataset_dir") or "data"))
    info = _info(draft, folder)
    if name not in info:
        draft.remarks.append(f"{name}: {folder}/dataset_info.json does not say what it is; correct its source")
        return located(draft, str(folder / f"{name}.json")), ""
    entry = info[name]
    hub = entry.get("hf_hub_url")
    source = {"hub": hub} if hub else located(draft, str(folder / str(entry.get("file_name", name))))
    if hub:
        source |= {
            ours: entry[theirs] for theirs, ours in (("subset", "config"), ("split", "split")) if theirs in entry
        }
    columns = entry.get("columns", {})
    if not draft.roles:
        return _with_columns(draft, source, {}, columns.get("prompt", "text")), ""
    shape = _shape(entry)
    roles = trainers()["columns"][shape]
    defaults = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
    wanted = {
        roles[each]: columns.get(each, defaults.get(each, each))
        for each in roles
        if each in defaults or each in columns
    }
    if lost := sorted(set(columns) - set(roles)):
        draft.remarks.append(f"{name}: the columns {', '.join(lost)} are not used")
    fields = {
        role: column for role, column in wanted.items() if role != column and (role != "input" or "query" in columns)
    }
    return _with_columns(draft, source, fields, None), shape


def _shape(entry: dict[str, Any]) -> str:
    """The shape of the rows of a LLaMA-Factory data set."""
    by_turns = entry.get("formatting") == "sharegpt"
    openai = entry.get("tags", {}).get("role_tag") == "role"
    pairs, labelled = bool(entry.get("ranking")), "kto_tag" in entry.get("columns", {})
    if by_turns:
        return "messages" if openai and not pairs else "sharegpt"
    return "single_turn" if pairs else "unpaired" if labelled else "alpaca"


def _info(draft: Draft, folder: Path) -> dict[str, Any]:
    """The data sets that dataset_info.json describes; empty if there is none."""
    for candidate in (folder, draft.path.parent / folder):
        path = candidate / "dataset_info.json"
        if path.is_file():
            try:
                info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise RecipeError(f"{path}: not JSON: {error}") from None
            return info
    return {}


def common_shape(sourced: Iterable[Sourced]) -> str:
    """The shape of all sources, if they have the same; else empty."""
    shapes = {shape for _, shape in sourced}
    return shapes.pop() if len(shapes) == 1 else ""

"""Reads and checks the DeepSpeed config of a run: a JSON file, or the inline fields of a launch config.

The result contains ZeRO settings only. The engine adds the settings that belong to the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ptft_dist.config.shipped import find_shipped, shipped
from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_keys import STAGE, TOP, ZERO, Refused, Table, Values

# Inline fields with ZeRO settings. Accelerate ignores them if there is a JSON file.
ZERO_FIELDS = (
    "zero_stage",
    "offload_optimizer_device",
    "offload_param_device",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
)
_NO_FILE = ("", "none")


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON, without keys that are "auto" or have no effect.

    Raises:
        RecipeError: the file cannot be read, or a key is unknown, has an invalid value, or belongs elsewhere. One
            message lists all such keys.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise RecipeError(f"{path}: the DeepSpeed config cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path}: the DeepSpeed config is not valid JSON: {error}") from None
    return check_deepspeed_config(config, str(path))


def check_deepspeed_config(config: Any, source: str) -> dict[str, Any]:
    """`config` without keys that are "auto" or have no effect. Raises RecipeError with all problems.

    source: the file or launch config, for messages.
    """
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or "stage" not in zero:
        raise RecipeError(f'{source}: a DeepSpeed config needs "zero_optimization": {{"stage": 1, 2 or 3}}')
    problems: list[str] = []
    checked = _checked(config, TOP, (), problems)
    problems += _conflicts(checked.get("zero_optimization", {}))
    if problems:
        raise RecipeError("\n".join(f"{source}: {problem}" for problem in problems))
    return checked


def inline_deepspeed_config(fields: Mapping[str, str], source: str) -> dict[str, Any]:
    """The config for the inline fields of a launch config: the shipped zero<stage>.json with their offloading.

    fields: `deepspeed_config` of the launch config, every value as text. Raises RecipeError.
    """
    stage = fields.get("zero_stage", "2")  # Accelerate's default
    if stage not in ("1", "2", "3"):
        raise RecipeError(f"{source}: zero_stage: {stage}; expected {STAGE.expected}")
    config = json.loads((shipped("ds_configs") / f"zero{stage}.json").read_text(encoding="utf-8"))
    for what in ("optimizer", "param"):
        device = fields.get(f"offload_{what}_device", "none").lower()
        nvme_path = fields.get(f"offload_{what}_nvme_path", "none")
        if device != "none":
            path = {} if nvme_path == "none" else {"nvme_path": nvme_path}
            config["zero_optimization"][f"offload_{what}"] = {"device": device, **path}
    return check_deepspeed_config(config, f"{source}: deepspeed_config")


def resolve_deepspeed_config(fields: Mapping[str, str], source: str, folder: Path | None = None) -> dict[str, Any]:
    """The DeepSpeed config of a launch config, from its file or its inline fields.

    folder: another directory for relative file names, see find_deepspeed_json. Raises RecipeError.
    """
    named = fields.get("deepspeed_config_file", "none")
    if named in _NO_FILE:
        return inline_deepspeed_config(fields, source)
    both = [f"{name}: {fields[name]}" for name in ZERO_FIELDS if fields.get(name, "none") != "none"]
    if both:
        raise RecipeError(
            f"{source}: {', '.join(both)}: no effect together with deepspeed_config_file: {named}; remove either"
        )
    return read_deepspeed_config(find_deepspeed_json(named, source, folder))


def find_deepspeed_json(named: str, source: str, folder: Path | None = None) -> Path:
    """The file of deepspeed_config_file, relative to the current directory as in Accelerate, or else to `folder`.

    `ds_configs/NAME.json`, used by earlier shipped launch configs, is the shipped file in any directory. Raises
    RecipeError.
    """
    for candidate in (Path(named), *([folder / named] if folder else [])):
        if candidate.is_file():
            return candidate.resolve()
    if Path(named).parent == Path("ds_configs"):
        return find_shipped("ds_configs", Path(named).name.removesuffix(".json"), ".json").resolve()
    raise RecipeError(
        f"{source}: deepspeed_config_file: {named}: no such file; a relative name starts at the current directory, "
        f"which is {Path.cwd()}; give the absolute path"
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name}: this key is given twice")
    return dict(pairs)


def _checked(config: Mapping[str, Any], table: Table, at: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    """The values to pass to DeepSpeed. Appends invalid keys to `problems`, each as a message with its dotted key."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        name, rule = ".".join((*at, key)), table.get(key)
        if rule is None:
            problems.append(f"{name}: unknown key{_did_you_mean(key, table, at)}")
        elif value is None:
            continue  # null means DeepSpeed's default, like a missing key
        elif isinstance(rule, Refused):
            if not rule.neutral(value):
                problems.append(f"{name}: {rule.reason}")
        elif isinstance(rule, Values):
            if rule.accepts(value):
                kept[key] = value
            else:
                problems.append(f"{name}: {value!r}; expected {rule.expected}")
        elif isinstance(value, dict):
            kept[key] = _checked(value, rule, (*at, key), problems)
        else:
            problems.append(f"{name}: {value!r}; expected a block of keys: {', '.join(rule)}")
    return kept


def _did_you_mean(key: str, table: Table, at: tuple[str, ...]) -> str:
    if not at and key in ZERO:
        return f"; did you mean zero_optimization.{key}?"
    near = get_close_matches(key, table, n=1)
    return f"; did you mean {'.'.join((*at, near[0]))}?" if near else "; remove it"


def _conflicts(zero: Mapping[str, Any]) -> Iterator[str]:
    """Values that are valid alone but not together. DeepSpeed would refuse them only after the process group exists."""
    stage, parameters = zero.get("stage"), zero.get("offload_param", {})
    if parameters.get("device", "none") != "none" and stage != 3:
        yield f"zero_optimization.offload_param.device: {parameters['device']}: needs stage 3, but the stage is {stage}"
    optimizer = zero.get("offload_optimizer", {})
    if stage != 3 and (optimizer.get("device") == "nvme" or optimizer.get("ratio", 1) < 1):
        yield "zero_optimization.offload_optimizer: nvme and a ratio below 1 need stage 3; use device cpu and no ratio"
    for name, block in (("offload_param", parameters), ("offload_optimizer", optimizer)):
        if block.get("device") == "nvme" and "nvme_path" not in block:
            yield (
                f"zero_optimization.{name}.device: nvme: needs nvme_path (inline: {name}_nvme_path, which stock "
                f"`accelerate launch` does not pass on; use `ptft train --launch` or a DeepSpeed JSON)"
            )

"""Reads launch configs: unmodified Accelerate files, as written by `accelerate config`.

Accelerate ignores unknown keys within a block, and fails with a traceback for unknown top-level keys. Here all keys are
checked, and the message suggests the nearest known key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ptft_dist.config.shipped import find_shipped
from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_config import find_deepspeed_json, resolve_deepspeed_config
from ptft_dist.launch.launch_keys import BLOCK_TYPES, BLOCKS, KEYS, OF_OTHER_LAUNCHERS, TYPES
from ptft_dist.launch.settings import DEEPSPEED_VARIABLES, PARALLEL_SIZES, LaunchSettings


@dataclass(frozen=True)
class LaunchFile:
    """A launch config that has been read and checked."""

    path: Path
    distributed_type: str
    processes: int | None
    """Total over all machines; None if the file leaves it to the command line."""
    machines: int
    deepspeed_launcher: str | None
    deepspeed_json: Path | None
    """The file of deepspeed_config_file; None for inline fields and without DeepSpeed."""
    settings: LaunchSettings

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables for the ranks that `accelerate launch` does not set: the paths of NVMe offloading."""
        fields = self.settings.deepspeed or {}
        return {DEEPSPEED_VARIABLES[name]: fields[name] for name in fields if name.endswith("_nvme_path")}


def read_launch_file(name: str) -> LaunchFile:
    """Read and check a launch config and its DeepSpeed config. name: a path, or the name of a shipped launch config.

    Raises:
        RecipeError: the file cannot be read, is not a launch config, or has invalid keys or values.
    """
    path = find_shipped("launch_configs", name, ".yaml")
    try:
        config = YAML(typ="safe").load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise RecipeError(f"{path}: the launch config cannot be read: {error}") from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise RecipeError(
            f"{path}: not an Accelerate config: it has no distributed_type; `accelerate config` writes one"
        )
    config = _with_prefixes(config)
    problems = list(_problems(config))
    if problems:
        raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems))
    deepspeed = config.get("deepspeed_config") or {}
    settings = settings_of_file(config, str(path))
    json_path = None
    if settings.deepspeed is not None:
        resolve_deepspeed_config(settings.deepspeed, str(path), path.parent)
        named = settings.deepspeed.get("deepspeed_config_file", "none")
        json_path = None if named == "none" else find_deepspeed_json(named, str(path), path.parent)
    processes = config.get("num_processes", 1 if config["distributed_type"] == "NO" else -1)
    return LaunchFile(
        path=path,
        distributed_type=config["distributed_type"],
        processes=None if processes == -1 else processes,
        machines=config.get("num_machines", 1),
        deepspeed_launcher=deepspeed.get("deepspeed_multinode_launcher"),
        deepspeed_json=json_path,
        settings=settings,
    )


def settings_of_file(config: Mapping[str, Any], source: str) -> LaunchSettings:
    """The settings of a launch config, as text like in the launcher's environment variables."""
    kind = config["distributed_type"]
    deepspeed, fsdp = config.get("deepspeed_config") or {}, config.get("fsdp_config") or {}
    parallel = config.get("parallelism_config") or {}
    dynamo = (config.get("dynamo_config") or {}).get("dynamo_backend", config.get("dynamo_backend", "no"))
    precision = config.get("mixed_precision") or ("fp16" if config.get("fp16") else "no")
    return LaunchSettings(
        source=source,
        mixed_precision=_text(precision),
        dynamo_backend=_text(dynamo).lower(),
        fsdp_version=int(fsdp.get("fsdp_version", 1)) if kind == "FSDP" else None,
        gradient_accumulation_steps=_text(deepspeed.get("gradient_accumulation_steps", "auto")),
        gradient_clipping=_text(deepspeed.get("gradient_clipping", "auto")),
        parallel_sizes={name: parallel.get(f"parallelism_config_{name}", 1) for name in PARALLEL_SIZES}
        if parallel
        else {},
        deepspeed={name: _text(deepspeed[name]) for name in DEEPSPEED_VARIABLES if deepspeed.get(name) is not None}
        if kind == "DEEPSPEED"
        else None,
    )


def _with_prefixes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the prefix `fsdp_` to the keys of fsdp_config, which Accelerate also accepts without it."""
    fsdp = config.get("fsdp_config")
    if not isinstance(fsdp, dict):
        return dict(config)
    return {**config, "fsdp_config": {k if str(k).startswith("fsdp") else f"fsdp_{k}": v for k, v in fsdp.items()}}


def _text(value: Any) -> str:
    """A value as Accelerate passes it to the ranks. YAML 1.1 reads an unquoted `no` as false."""
    return "no" if value is False else str(value)


def _problems(config: Mapping[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key not in KEYS:
            yield f"{key}: unknown key{_nearest(key, KEYS)}"
        elif key in BLOCKS and isinstance(value, dict):
            for inner in value:
                if inner not in BLOCKS[key]:
                    yield f"{key}.{inner}: unknown key{_nearest(inner, BLOCKS[key], key)}"
            yield from _without_effect(key, value, config["distributed_type"])
        elif key in BLOCKS and value is not None:
            yield f"{key}: {value!r}; expected a block of keys"
    kind, processes = config["distributed_type"], config.get("num_processes")
    if kind not in TYPES:
        yield f"distributed_type: {kind}: not supported; use one of {', '.join(TYPES)} (on a CPU: launch config cpu)"
    for key in ("num_processes", "num_machines"):
        number = config.get(key, 1)
        if (
            not isinstance(number, int)
            or isinstance(number, bool)
            or (number < 1 and (key, number) != ("num_processes", -1))
        ):
            yield f"{key}: {number!r}; expected a whole number, 1 or more"
            return
    if kind == "NO" and processes not in (None, -1, 1):
        yield f"num_processes: {processes}: distributed_type NO starts one process; use MULTI_GPU (multi_gpu)"


def _without_effect(block: str, values: Mapping[str, Any], kind: str) -> Iterator[str]:
    given = [key for key, value in values.items() if value is not None]
    needed = BLOCK_TYPES.get(block, kind)
    if given and kind != needed:
        yield f"{block}: no effect with distributed_type: {kind}; set distributed_type: {needed}, or remove the block"
        return
    for key in given:
        if key in OF_OTHER_LAUNCHERS:
            yield (
                f"{block}.{key}: no effect, because torchrun starts the processes; remove it, and choose GPUs with "
                "gpu_ids or CUDA_VISIBLE_DEVICES"
            )


def _nearest(key: str, known: Sequence[str], block: str = "") -> str:
    near = get_close_matches(str(key), known, n=1)
    return f"; did you mean {f'{block}.' if block else ''}{near[0]}?" if near else "; remove it"

"""Tiny pretrained networks and the methods of adapting them, for the tests of the promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import start
from tiny import write_tiny

METHODS: dict[str, dict[str, Any]] = {
    "last_layers": {"adapt": {"last_layers": 1}},
    "bitfit": {"adapt": "bitfit"},
    "lora": {"adapt": {"lora": {"r": 4}}},
    "dora": {"adapt": {"lora": {"r": 4, "dora": True}}},
    "pissa": {"adapt": {"lora": {"r": 4, "init": "pissa"}}},
    "eva": {"adapt": {"lora": {"r": 4, "init": "eva", "eva_rows": 16}}},
    "qlora": {"adapt": {"lora": {"r": 4}}, "quantize": {"type": "nf4", "storage_dtype": "fp32"}},
    "adalora": {"adapt": {"adalora": {"r": 4, "target_r": 2}}},
    "ia3": {"adapt": {"ia3": {}}},
    "prompt_tuning": {"adapt": {"prompt_tuning": {"tokens": 4}}},
    "bottleneck": {"adapt": {"bottleneck": {"size": 8}}},
}
"""Name of a case -> keys of the model section."""


def write_base(folder: Path, cache: Path, task: str, layers: int = 2) -> Path:
    """A network that was trained for 2 updates of the tiny recipe, for `model.path`."""
    short: dict[str, Any] = {"train": {"max_steps": 2}, "eval": {"every": None}, "save": {"every": None}}
    write_tiny(folder, task, layers=layers, **short, run_dir="base")
    run = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    return folder / "base/model"


def write_adapted(folder: Path, base: Path, task: str, model: dict[str, Any], **changes: Any) -> Path:
    """The tiny recipe of a task, which adapts `base`."""
    if task == "span_corruption":
        changes = {"span_corruption": {"sentinels": 100}, **changes}  # the default; they are in the base's tokenizer
    section = {"config": None, "path": str(base), **model}
    return write_tiny(folder, task, model=section, tokenizer={"train": None, "path": str(base)}, **changes)

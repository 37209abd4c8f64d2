"""The shipped pipeline `demo` with small stages."""

from __future__ import annotations

import json

from ruamel.yaml import YAML
from support import ROOT

SMALL = {"train.max_steps": 2, "eval.every": 2, "eval.max_rows": 8, "save.every": 2, "data.train.0.limit": 40}
SMALL |= {"data.validation": 0.2, "batch.global_size": 8, "batch.micro_size": 4}


def small_demo(out: str, **changes: dict[str, object]) -> str:
    """The text of a pipeline file. changes: further values to set in the recipes of stages, by their names."""
    values = YAML(typ="safe").load(ROOT / "pipelines/demo.yaml")
    values["out"] = out
    for name, stage in values["stages"].items():
        stage.setdefault("set", {}).update(SMALL | ({"ppo.prompts": 8} if name == "ppo" else {}))
        stage["set"].update(changes.get(name, {}))
    return json.dumps(values, indent=1)

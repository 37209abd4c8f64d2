"""The model card (README.md) of an exported model, from the files of its run. Equal runs have equal cards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptft_dist.config.load import Loaded, given_values, to_yaml
from ptft_dist.config.secrets import hide
from ptft_dist.reporting.metrics import TIMING_KEYS

CARD = "README.md"
_LICENSE = "license: not set. Write it into the first lines of this file before you publish the model"


def model_card(
    loaded: Loaded,
    run_dir: Path,
    step: int,
    *,
    base: str | None,
    task_type: str,
    labels: Sequence[str],
    license_id: str | None = None,
) -> str:
    """The card of the weights of one update: YAML front matter and Markdown.

    Args:
        step: the update. Its metrics are read from metrics.jsonl, if it was evaluated.
        base: the directory or Hub name of the model that training started from; None if it had random weights.
        task_type: the transformers class that loads the model, or its base, such as AutoModelForCausalLM.
        labels: of a classifier's head, in the order of their ids.
        license_id: an identifier of the Hub, such as apache-2.0.
    """
    recipe = loaded.recipe
    metrics = metrics_at(run_dir, step)
    adapter = recipe.model.adapt.adds_adapter
    local = base is not None and Path(base).is_absolute()
    hub = sorted({source.hub for source in _sources(recipe) if source.hub is not None})
    head: dict[str, Any] = {
        "license": license_id,
        "library_name": "peft" if adapter else "transformers",
        "base_model": None if base is None or local else base,
        "tags": ["ptft", recipe.task, *([recipe.model.adapt.method] if base is not None else [])],
        "datasets": hub or None,
        "metrics": [name.removeprefix("eval/") for name in metrics] or None,
    }
    front = to_yaml({key: value for key, value in head.items() if value is not None})
    notice = "" if license_id else f"# {_LICENSE}\n"
    what = "An adapter" if adapter else "A model"
    parent = f" of {Path(base).name if local else base}" if base is not None else ", trained from random weights"
    sections = [
        f"---\n{notice}{front}---\n",
        f"# {what}{parent}\n\nTask: `{recipe.task}`, after update {step:,}. Trained with ptft_dist.\n",
        *([] if license_id else [f"{_LICENSE[:1].upper()}{_LICENSE[1:]}.\n"]),
        f"## Use\n\n{usage(recipe, base, task_type, labels)}",
        f"## Metrics\n\n{_table(metrics, 'metric')}" if metrics else "## Metrics\n\nThis update was not evaluated.\n",
        f"## Data\n\n{_data(_report(run_dir))}",
        f"## Recipe\n\nAll other keys have their default values.\n\n```yaml\n{to_yaml(given_values(loaded))}```\n",
        f"## Versions\n\n{_table(_versions(run_dir), 'package')}",
    ]
    return hide("\n".join(sections))


def merged_card(adapter_card: str | None, base: str, task_type: str) -> str:
    """The card of a model into which an adapter was merged: what the adapter's card says, with another way to load it.

    Args:
        adapter_card: README.md of the adapter; None if it has none.
        base: the directory or Hub name of the base.
        task_type: the transformers class that loads the merged model.
    """
    local = Path(base).is_absolute()
    head = {
        "license": None,
        "library_name": "transformers",
        "base_model": None if local else base,
        "tags": ["ptft", "merged"],
    }
    front = to_yaml({key: value for key, value in head.items() if value is not None})
    parts = (adapter_card or "").split("\n## ")
    kept = [part for part in parts[1:] if not part.startswith("Use\n")]
    note = "The metrics are those of base and adapter before the merge.\n" if kept else ""
    sections = [
        f"---\n# {_LICENSE}\n{front}---\n",
        f"# A model: an adapter merged into {Path(base).name if local else base}\n\nMerged with ptft_dist. {note}",
        f"{_LICENSE[:1].upper()}{_LICENSE[1:]}.\n",
        f"## Use\n\n{_loading(task_type)}",
        *(f"## {part}" for part in kept),
    ]
    return hide("\n".join(sections))


def _loading(auto_class: str) -> str:
    code = [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained("DIRECTORY")',
        'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")',
    ]
    return "```python\n" + "\n".join(code) + "\n```\n"


def metrics_at(run_dir: Path, step: int) -> dict[str, float]:
    """The metrics of the evaluation after this update, by name; empty if there was none."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # a line that a full disk has cut
            continue
        if row.get("step") == step and any(key.startswith("eval/") for key in row):
            return {key: row[key] for key in row if key.startswith("eval/") and key not in TIMING_KEYS}
    return {}


def _sources(recipe: Any) -> list[Any]:
    validation = recipe.data.validation
    return [*recipe.data.train, *(validation if isinstance(validation, tuple | list) else ())]


def usage(recipe: Any, base: str | None, auto_class: str, labels: Sequence[str]) -> str:
    """How to load the exported directory.

    base: the directory or Hub name of the model that an adapter belongs to. A relative model.path would not do: it
    starts at the recipe's directory. labels: see `model_card`.
    """
    adapt = recipe.model.adapt
    imports = [f"from transformers import {auto_class}, AutoTokenizer"]
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")'
    if not adapt.adds_adapter:
        code = [*imports, "", f'model = {auto_class}.from_pretrained("DIRECTORY")', tokenizer]
    else:
        options = f", id2label={dict(enumerate(labels))}" if auto_class.endswith("Classification") else ""
        options += f', revision="{recipe.model.revision}"' if recipe.model.revision else ""
        bottleneck = [
            "from ptft_dist.networks.adapt import bottleneck",
            "",
            "bottleneck.register()  # peft has no bottleneck adapters",
        ]
        code = [
            "from peft import PeftModel",
            *imports,
            *(bottleneck if adapt.bottleneck is not None else [""]),
            f'base = {auto_class}.from_pretrained("{base}"{options})',
            tokenizer,
            "ids = max(tokenizer.get_vocab().values()) + 1",
            "if base.config.get_text_config().vocab_size < ids:",
            "    base.resize_token_embeddings(ids)",
            'model = PeftModel.from_pretrained(base, "DIRECTORY")',
        ]
    text = "```python\n" + "\n".join(code) + "\n```\n"
    return text + ("\nOr: `ptft generate DIRECTORY --prompt TEXT`\n" if recipe.settings.writes else "")


def _report(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "data_report.json"
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return report


def _data(report: Mapping[str, Any]) -> str:
    """Rows and tokens of both sides."""
    if not report:
        return "Unknown: the run has no data_report.json.\n"
    lines = ["| side | examples | rows | tokens |", "|---|---|---|---|"]
    lines += [
        f"| {side} | {counts['examples']:,} | {counts['rows']:,} | {counts['tokens']:,} |"
        for side in ("train", "validation")
        if (counts := report.get(side)) is not None
    ]
    dropped = sum(entry[0] for entry in (report.get("dropped") or {}).values())
    lines += ["", f"Rows have up to {report['max_length']:,} tokens; {dropped:,} {report['reads']}s were dropped."]
    if labels := (report.get("survey") or {}).get("labels"):
        lines += ["", "Labels: " + ", ".join(map(str, labels))]
    return "\n".join(lines) + "\n"


def _versions(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "environment.json"
    if not file.is_file():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    return {"ptft_dist": values["ptft_dist"], "python": values["python"], **values["packages"]}


def _table(values: Mapping[str, Any], name: str) -> str:
    lines = [f"| {name} | value |", "|---|---|"]
    lines += [
        f"| {key} | {value:.6g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in values.items()
    ]
    return "\n".join(lines) + "\n"

"""Rules for batches, the optimizer, evaluation, logging, preferences and rewards."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptft_dist.converting.draft import Draft
from ptft_dist.converting.rules import Entry, Outcome, rule, translated

# --- batches, length, optimizer ---------------------------------------------------------------------------------------


_STAGE = re.compile(r"(?:zero|stage|z)[_-]?([0-3])", re.IGNORECASE)


@rule
def batch(entry: Entry) -> Outcome:
    return {"batch.micro_size": entry.draft.value("per_device_train_batch_size"), "batch.global_size": entry.draft.rows}


@rule
def batch_size(entry: Entry) -> Outcome:
    """axolotl's counts the rows of an update of one process, as its code divides it by micro_batch_size alone."""
    return batch(entry) if entry.draft.trainer == "axolotl" else {entry.key: entry.value}


@rule
def group(entry: Entry) -> Outcome:
    """A rollout of TRL has the responses of one update."""
    prompts = entry.key.replace("group_size", "prompts")
    if entry.draft.rows % entry.value:
        entry.draft.remarks.append(
            f"{prompts}: {entry.draft.rows} responses of an update are no multiple of {entry.value} for each prompt"
        )
        return {entry.key: entry.value}
    return {entry.key: entry.value, prompts: entry.draft.rows // entry.value}


@rule
def length(entry: Entry) -> Outcome:
    steps = entry.draft.value("max_steps") or 0
    if entry.key == "train.max_steps":
        return {entry.key: steps} if steps > 0 else {}
    return {entry.key: entry.value} if steps <= 0 else "max_steps overrides it"


@rule
def precision(entry: Entry) -> Outcome:
    return {entry.key: entry.draft.precision}


@rule
def schedule(entry: Entry) -> Outcome:
    outcome = translated(entry)
    if entry.value == "polynomial" and not isinstance(outcome, str):
        power = (entry.draft.own("lr_scheduler_kwargs") or {}).get("power", 1.0)
        return {**outcome, "optim.power": power}
    return outcome


@rule
def schedule_settings(entry: Entry) -> Outcome:
    """The lowest learning rate. Other arguments of a schedule have no counterpart."""
    if not isinstance(entry.value, dict):
        return {entry.key: entry.value}
    known: dict[str, Any] = {}
    if "min_lr_rate" in entry.value:
        known[entry.key] = entry.value["min_lr_rate"]
    if "min_lr" in entry.value:
        known[entry.key] = entry.value["min_lr"] / entry.draft.value("learning_rate")
    others = sorted(set(entry.value) - {"min_lr_rate", "min_lr", "power"})
    return known or (f"there is no {', '.join(others)} here" if others else {})


@rule
def warmup(entry: Entry) -> Outcome:
    if entry.draft.value("lr_scheduler_type") == "constant":
        return "the schedule constant of transformers has no warmup"
    steps = entry.draft.value("warmup_steps")
    ratio = entry.draft.value("warmup_ratio") if steps is None else entry.draft.given.get("warmup_ratio")
    if not steps and not ratio:
        return {}
    return {entry.key: steps or ratio}


@rule
def betas(entry: Entry) -> Outcome:
    if "adamw" not in str(entry.draft.value("optim") or "adamw"):
        return "only Adam has it"
    return {entry.key: [entry.draft.own("adam_beta1") or 0.9, entry.draft.own("adam_beta2") or 0.999]}


# --- evaluation, checkpoints, logging ---------------------------------------------------------------------------------


@rule
def every(entry: Entry) -> Outcome:
    """The key is eval.every or save.every."""
    what = entry.key.partition(".")[0]
    steps = entry.draft.own(f"{what}_steps")
    strategy = entry.draft.own(f"{what}_strategy") or (
        entry.draft.own("evaluation_strategy") if what == "eval" else None
    )
    if "per_epoch" in entry.name or (strategy == "epoch" and not entry.name.endswith("_steps")):
        return f"it counts epochs; set {entry.key} to the number of updates. Without it, ptft does it at the end"
    if strategy in ("no", "epoch") or (strategy is None and entry.draft.trainer != "axolotl"):
        return {} if entry.name.endswith("strategy") else f"{what}_strategy does not ask for it"
    steps = steps or entry.draft.value("logging_steps")
    if not steps or steps < 1:
        return f"{steps} is a fraction of all updates; set {entry.key} to a number of updates"
    return {entry.key: int(steps)}


@rule
def metric(entry: Entry) -> Outcome:
    return {entry.key: entry.value.removeprefix("eval_")}


@rule
def goal(entry: Entry) -> Outcome:
    return {entry.key: "max" if entry.value else "min"}


@rule
def best(entry: Entry) -> Outcome:
    return {"save.best": True, "save.export": "best"} if entry.value else {}


@rule
def trackers(entry: Entry) -> Outcome:
    wanted = set(entry.value if isinstance(entry.value, list) else [entry.value])
    if wanted <= {"tensorboard", "all"}:
        return {}
    return {entry.key: False} if wanted == {"none"} else entry.setting.note


@rule
def launch(entry: Entry) -> Outcome:
    """DeepSpeed: the launch config with the same ZeRO stage."""
    config = entry.value if isinstance(entry.value, dict) else _deepspeed_file(entry.draft, str(entry.value))
    zero = config.get("zero_optimization", {})
    name = "" if isinstance(entry.value, dict) else Path(str(entry.value)).name
    in_name = _STAGE.search(name)
    stage = str(zero["stage"]) if "stage" in zero else in_name[1] if in_name else "2"
    offload = "offload" in name or any(key in zero for key in ("offload_optimizer", "offload_param"))
    if stage == "0":
        entry.draft.launch = "multi_gpu"
    else:
        entry.draft.launch = f"zero{stage}" + "_offload" * (stage == "3" and offload)
    return f"it belongs to the launch: ptft train RECIPE --launch {entry.draft.launch}. Your own file: docs/launch.md"


def _deepspeed_file(draft: Draft, name: str) -> dict[str, Any]:
    for candidate in (Path(name), draft.path.parent / name):
        if candidate.is_file():
            try:
                contents = json.loads(candidate.read_text(encoding="utf-8"))
            except ValueError:
                return {}
            return contents if isinstance(contents, dict) else {}
    return {}


# --- preferences and rewards ------------------------------------------------------------------------------------------


@rule
def loss(entry: Entry) -> Outcome:
    single = entry.value[0] if isinstance(entry.value, list) and len(entry.value) == 1 else entry.value
    return translated(replace(entry, value=single))


@rule
def reference(entry: Entry) -> Outcome:
    if entry.name == "precompute_ref_log_probs":
        return {} if entry.value or entry.draft.adapts else {entry.key: "network"}
    return entry.setting.note


@rule
def reward_functions(entry: Entry) -> Outcome:
    weights = entry.draft.own("reward_weights") or []
    names = entry.value if isinstance(entry.value, list) else [entry.value]
    rewards: list[dict[str, Any]] = []
    for number, each in enumerate(names):
        is_function = entry.name.startswith("reward_func") and "/" not in each
        plain = {"function": each if "." in each or ":" in each else f"trl.rewards:{each}"}
        rewards.append({**(plain if is_function else {"model": each})})
        if number < len(weights):
            rewards[-1]["weight"] = weights[number]
    return {entry.key: rewards}


@rule
def part_of_rewards(entry: Entry) -> Outcome:
    return {} if entry.draft.own("reward_funcs") else "there are no reward_funcs"


@rule
def scale(entry: Entry) -> Outcome:
    if entry.value == "batch":
        return "advantages are scaled by their group only"
    return {entry.key: entry.value in (True, "group")}

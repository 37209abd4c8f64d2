"""Standard benchmarks with lm-eval (EleutherAI's lm-evaluation-harness), for `ptft evaluate --lm-eval`.

lm-eval is an optional dependency. It gets the loaded network and tokenizer, and does the rest: prompts, examples,
requests and metrics are its own, so the numbers are those of its Hugging Face backend.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from ptft_dist.errors import DataError, RecipeError
from ptft_dist.inference.generation import libraries_restored, load_network
from ptft_dist.judging.code_limits import limited
from ptft_dist.launch.environment import place
from ptft_dist.networks.names import directory_or_hub_name, model_of
from ptft_dist.reporting.messages import say
from ptft_dist.reporting.output import check_writable, json_line, write_file, write_text

BATCH = 8
"""Sequences in a forward pass."""
ALLOW = "HF_ALLOW_CODE_EVAL"
"""The environment variable with which Hugging Face's `evaluate` is told to run code."""


@dataclass(frozen=True)
class HarnessResult:
    """What lm-eval has measured."""

    model: str
    lm_eval: str
    """The version of lm-eval."""
    tasks: dict[str, dict[str, float]]
    """Task or group -> metric, such as `acc` or `acc_stderr`; a filter follows its metric as `exact_match,strict`."""
    rows: dict[str, int]
    """Task -> number of its rows."""
    shots: dict[str, int]
    """Task -> number of examples before a row."""


def run_harness(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    out: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    allow_code: bool = False,
) -> HarnessResult:
    """Evaluate a model on tasks of lm-eval; see api.evaluate_on_benchmarks."""
    if find_spec("lm_eval") is None:
        raise RecipeError('--lm-eval: lm-eval is not installed: pip install "ptft-dist[lm-eval]"')
    if place().world_size > 1:
        raise RecipeError("--lm-eval: it runs in one process; start `ptft evaluate` without a launcher")
    if include is not None and not include.is_dir():
        raise RecipeError(f"--lm-eval-path: {include} is no directory. Name one with task files (.yaml) of lm-eval")
    if out is not None:
        check_writable(out)
    with _quiet(), _code_allowed(allow_code), libraries_restored():
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        manager = _manager(tasks, include)
        chosen = _known(manager, tasks)
        loaded = _load(manager, chosen, allow_code=allow_code)
        name, network, tokenizer = _network(model)
        network.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
        say(f"lm-eval {version('lm_eval')}: {', '.join(chosen)}")
        found = simple_evaluate(
            HFLM(pretrained=network, tokenizer=tokenizer, batch_size=BATCH),
            tasks=loaded,
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=allow_code,
        )
    assert found is not None
    result = _result(name, found)
    if out is not None:
        _write(out, result, found["samples"])
        say(f"written to {out}")
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the log of lm-eval except for errors."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Let `evaluate` run code only if it is allowed here, whatever the environment says."""
    before = os.environ.pop(ALLOW, None)
    if allowed:
        os.environ[ALLOW] = "1"
    try:
        yield
    finally:
        os.environ.pop(ALLOW, None)
        if before is not None:
            os.environ[ALLOW] = before


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """The index of tasks: that of `include` if all names are there, because the one of all tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    if include is None:
        return TaskManager()
    own = TaskManager(include_path=str(include), include_defaults=False)
    return own if set(names) <= set(own.all_subtasks) else TaskManager(include_path=str(include))


def _known(manager: Any, names: Sequence[str]) -> list[str]:
    """The names of tasks, groups and tags; a name may be a pattern such as mmlu_*. Raises RecipeError."""
    from difflib import get_close_matches

    chosen: list[str] = []
    for name in names:
        matches = [name] if name in manager.task_index else manager.match_tasks([name])
        if not matches:
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}" if near else ""
            raise RecipeError(
                f"--lm-eval: lm-eval has no task {name!r}{hint}. `lm-eval ls tasks` lists them; --lm-eval-path names a "
                "directory with your own ones"
            )
        chosen += matches
    return list(dict.fromkeys(chosen))


def _load(manager: Any, names: Sequence[str], *, allow_code: bool) -> list[Any]:
    """The tasks and groups, with limits on those that run code.

    Raises:
        RecipeError: a task runs code, and this is not allowed. Python files of a task are not imported before.
        DataError: a task cannot be loaded, for example because its rows are not on this machine.
    """
    if not allow_code and (running := [name for name in names if _runs_code(manager.task_index, name)]):
        raise _refused(running)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # of the Hub, of data sets, or of the Python code of a task
        raise DataError(
            f"--lm-eval: {', '.join(names)} cannot be loaded: {error}. Correct the task, or fetch its rows while there "
            "is a network"
        ) from error
    unsafe = {name: task for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)}
    if unsafe and not allow_code:
        raise _refused(unsafe)
    for name, task in unsafe.items():
        task.process_results = limited(task.process_results, f"--lm-eval: the scoring of {name}")
    groups = loaded["groups"].values()
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    inside |= {group.name for parent in groups for group in parent.get_all_groups() if group is not parent}
    every = [*((group.name, group) for group in groups), *loaded["tasks"].items()]
    return [each for name, each in every if name not in inside]


def _refused(names: Sequence[str] | Mapping[str, Any]) -> RecipeError:
    return RecipeError(
        f"--lm-eval: {', '.join(names)} runs code that the model writes. Use a machine or container without anything "
        "valuable, and allow it with --allow-code"
    )


def _runs_code(index: Mapping[str, Any], name: str) -> bool:
    """Whether a task, or a task of a group or tag, is marked as unsafe. Nothing is imported."""
    entry = index.get(name)
    if entry is None:
        return False
    config: Mapping[str, Any] = entry.cfg or {}
    if config.get("unsafe_code"):
        return True
    children = list(entry.tags) if entry.kind.name == "TAG" else []
    below = config.get("task")
    for child in below if isinstance(below, list) else ():
        if isinstance(child, Mapping) and child.get("unsafe_code"):
            return True
        children.append(child if isinstance(child, str) else str(child.get("task") or child.get("group")))
    return any(_runs_code(index, child) for child in children if child != name)


def _network(model: str | Path) -> tuple[str, Any, Any]:
    """Name, network and tokenizer of a run, a model or adapter directory, or a Hub name."""
    given = Path(model)
    if given.is_dir():
        folder = model_of(given)
        return str(folder), *load_network(folder, {}, None)
    name = directory_or_hub_name(str(model), Path.cwd(), "model")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
    return name, transformers.AutoModelForCausalLM.from_pretrained(name).eval(), tokenizer


def _result(name: str, found: Mapping[str, Any]) -> HarnessResult:
    tasks = {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and "," in key
        }
        for task, metrics in found["results"].items()
    }
    rows = {task: int(counts["effective"]) for task, counts in found["n-samples"].items()}
    shots = {task: int(count or 0) for task, count in found["n-shot"].items()}
    return HarnessResult(name, version("lm_eval"), tasks, rows, shots)


def _write(out: Path, result: HarnessResult, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write FILE.json and FILE.rows.jsonl, atomically. A row has task, document, target, responses and metrics."""
    kept = ("doc_id", "doc", "target", "filtered_resps", "filter")
    lines = (
        {"task": task, **{key: each[key] for key in kept}, **{name: each[name] for name in each["metrics"]}}
        for task, rows in samples.items()
        for each in rows
    )
    write_file(out.with_name(f"{out.stem}.rows.jsonl"), map(json_line, lines))
    write_text(out, json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")

"""Pipelines: stages that build on each other's outputs, such as tokenizer, pretraining, fine-tuning, evaluation.

    out: runs/demo
    stages:
      clm: {recipe: clm}
      sft: {recipe: sft, set: {model.config: null, model.path: "${stage:clm}"}}

Each stage has the directory OUT/NAME. `${stage:NAME}` is the output of an earlier stage:

    train        OUT/NAME/model
    tokenizer    OUT/NAME/tokenizer
    evaluate     OUT/NAME/metrics.json

A stage is done if its output exists, and was made from the same recipe, data and earlier stages: OUT/NAME/stage.json
has a hash of all three, written when the stage starts or is submitted. A training has also noted what it has read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ptft_dist.api import input_fingerprint, load_recipe, values_of_environment
from ptft_dist.config.consistency import no_metric
from ptft_dist.config.load import Loaded
from ptft_dist.config.places import expanded
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.section import Section
from ptft_dist.config.shipped import find_shipped
from ptft_dist.errors import EXIT_FINISHED, PtftError, RecipeError
from ptft_dist.launch.result import read_json
from ptft_dist.reporting.messages import say
from ptft_dist.reporting.run_files import lock_run_dir
from ptft_dist.runs.run_list import is_finished

OUTPUTS = {"train": "model", "tokenizer": "tokenizer", "evaluate": "metrics.json"}
"""Verb -> its output in the directory of the stage."""
RECORD, LIST = "stage.json", "pipeline.json"
_UNLISTED = ("router_loss", "reward_std", "time_s")
"""Metrics of evaluations that eval.metric does not accept. The first depends on the network."""
_REFERENCE = re.compile(r"\$\{stage:([^}]*)\}")


class JobSettings(Section):
    """What a stage asks Slurm for; without effect on this machine."""

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt | None = None
    processes_per_node: PositiveInt | None = None
    time: str | None = None
    """The time limit, such as 24:00:00."""


class StageSettings(Section):
    verb: Literal["train", "tokenizer", "evaluate"] = "train"
    recipe: str
    """A file, relative to that of the pipeline, or the name of a shipped recipe."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values that replace those of the recipe."""
    model: str | None = None
    """The model to evaluate."""
    launch: str | None = None
    """A launch config: a file, relative to that of the pipeline, or a shipped one. Default: --launch."""
    show: tuple[str, ...] = ()
    """Metrics for the table at the end."""
    job: JobSettings = Field(default_factory=JobSettings)


class PipelineSettings(Section):
    out: str
    """The directory of all stages, relative to the current directory."""
    stages: dict[str, StageSettings] = Field(min_length=1)


@dataclass(frozen=True)
class Stage:
    """One stage, with references replaced by paths."""

    name: str
    settings: StageSettings
    folder: Path
    """OUT/NAME, absolute."""
    recipe: str
    overrides: tuple[str, ...]
    model: str | None
    references: tuple[str, ...]
    """The names of the stages whose outputs it uses, each once."""

    @property
    def output(self) -> Path:
        return self.folder / OUTPUTS[self.settings.verb]

    @property
    def trains(self) -> bool:
        return self.settings.verb == "train"

    @property
    def run_dir(self) -> Path:
        return self.folder

    @property
    def command(self) -> list[str]:
        """The words after `ptft`, without the launch config."""
        verb = self.settings.verb
        if verb == "train":
            return [verb, self.recipe, *self.overrides, f"run_dir={json.dumps(str(self.folder))}"]
        model = [] if self.model is None else [self.model]
        return [verb, *model, self.recipe, *self.overrides, "--out", str(self.output)]

    def load(self) -> Loaded:
        """Its recipe. Raises RecipeError with the name of the stage."""
        try:
            words = [*self.overrides, f"run_dir={json.dumps(str(self.folder))}"]
            return load_recipe(self.recipe, words, training=self.settings.verb == "train")
        except RecipeError as error:
            raise RecipeError(f"stage {self.name}: {error}") from None


@dataclass(frozen=True)
class Pipeline:
    """Stages in an order in which each refers to earlier ones only."""

    out: Path
    stages: tuple[Stage, ...]
    again: frozenset[str] = frozenset()
    """Names of stages to be done again although they are done, or have been done in another way."""

    def is_done(self, stage: Stage) -> bool:
        """Whether its output is there, and was made from what it would be made from now."""
        return _has_ended_well(stage) and self.is_recorded(stage) and (not stage.trains or is_finished(stage))

    def is_recorded(self, stage: Stage) -> bool:
        """Whether its last start was with the same recipe, data and earlier stages."""
        return _recorded(stage) == self.keys[stage.name]

    def require_startable(self, stage: Stage) -> None:
        """Raises RecipeError if the stage has finished with another recipe or other data. A start would lose that."""
        if _has_ended_well(stage) and not self.is_done(stage):
            raise RecipeError(
                f"stage {stage.name}: its recipe, its data or an earlier stage has changed since it was done in "
                f"{stage.folder}. --again {stage.name} reruns it and all stages that depend on it, and renames their "
                "old directories; or choose another --out"
            )

    def set_aside(self) -> list[tuple[Path, Path]]:
        """Move the directories of all stages to be done again to OUT/NAME.1 or so; where each was and is.

        All at once, so that none counts as done when only some have been done again.

        Raises RecipeError if a process still trains in one of them; nothing is moved then.
        """
        old = [stage for stage in self.stages if stage.name in self.again and stage.folder.exists()]
        for stage in old:
            lock_run_dir(stage.folder).release()
        moved = []
        for stage in old:
            numbers = (number for number in itertools.count(1) if not (self.out / f"{stage.name}.{number}").exists())
            moved.append((stage.folder, self.out / f"{stage.name}.{next(numbers)}"))
            stage.folder.rename(moved[-1][1])
        return moved

    def begin(self, stage: Stage) -> None:
        """Record what the stage is made from. Raises RecipeError if its directory cannot be written."""
        outputs = {each.name: OUTPUTS[each.settings.verb] for each in self.stages}
        record = {"key": self.keys[stage.name], "verb": stage.settings.verb}
        try:
            stage.folder.mkdir(parents=True, exist_ok=True)
            (stage.folder / RECORD).write_text(json.dumps(record))
            (self.out / LIST).write_text(json.dumps({"stages": outputs}))
        except OSError as error:
            denied = f"out: {error.filename} cannot be written: {error.strerror}. Choose another directory"
            raise RecipeError(denied) from None

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """A hash for each stage: of its recipe, its data files, and the hashes of the stages that it refers to."""
        found: dict[str, str] = {}
        for stage in self.stages:
            loaded = stage.load()
            own = loaded.recipe.tokenizer
            if own.path is not None and Path(own.path).is_relative_to(self.out):  # the key of that stage stands for it
                recipe = loaded.recipe.model_copy(update={"tokenizer": own.model_copy(update={"path": None})})
                inputs = _inputs(stage, Loaded(recipe, loaded.path, loaded.base, {}, "", {}))
            else:
                inputs = _inputs(stage, loaded)
            parts = [stage.settings.verb, stage.model, loaded.resolved, inputs]
            parts += values_of_environment(loaded).values()
            parts += [found[name] for name in stage.references]
            found[stage.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return found


def read_pipeline(name: str, out: str | None = None, again: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline, and check the recipes of all its stages.

    Args:
        name: a file, or the name of a shipped pipeline.
        out: replaces `out` of the file.
        again: stages to be done again, with all that depend on them.

    Raises:
        RecipeError: the file, a reference or a recipe is wrong.
    """
    path = find_shipped("pipelines", name, ".yaml")
    try:
        values = YAML(typ="safe").load(path)
        settings = PipelineSettings.model_validate(values if out is None else {**values, "out": out})
    except (OSError, UnicodeDecodeError, YAMLError, TypeError) as error:
        raise RecipeError(f"{path}: the pipeline cannot be read: {error}") from None
    except ValidationError as error:
        raise RecipeError(
            "\n".join(f"{path}: {_place(each['loc'])}: {each['msg']}" for each in error.errors())
        ) from None
    folder = expanded(settings.out).absolute()
    stages: dict[str, Stage] = {}
    for stage_name, each in settings.stages.items():
        if not re.fullmatch(r"[\w-]+", stage_name):
            raise RecipeError(f"{path}: stages.{stage_name}: use letters, digits, - and _ in the name of a stage")
        stages[stage_name] = _stage(stage_name, each, folder, path, stages)
    if unknown := [each for each in again if each not in stages]:
        raise RecipeError(f"--again: {', '.join(unknown)}: no such stage; the stages are {', '.join(stages)}")
    marked = set(again)
    for stage in stages.values():
        marked |= {stage.name} if marked & set(stage.references) else set()
    for stage in stages.values():
        _check_recipe(stage, stage.load().recipe, f"{path}: stages.{stage.name}")
    return Pipeline(folder, tuple(stages.values()), frozenset(marked))


def _stage(name: str, settings: StageSettings, out: Path, path: Path, earlier: Mapping[str, Stage]) -> Stage:
    used: dict[str, None] = {}

    def output(found: re.Match[str]) -> str:
        if found[1] not in earlier:
            known = f"the stages before it are {', '.join(earlier)}" if earlier else "there is no stage before it"
            raise RecipeError(f"{path}: stages.{name}: ${{stage:{found[1]}}}: no such stage; {known}")
        used[found[1]] = None
        return str(earlier[found[1]].output)

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return _REFERENCE.sub(output, value)
        if isinstance(value, Mapping):
            return {key: replaced(each) for key, each in value.items()}
        return [replaced(each) for each in value] if isinstance(value, list | tuple) else value

    if (settings.model is not None) != (settings.verb == "evaluate"):
        raise RecipeError(f"{path}: stages.{name}.model: needed by the verb evaluate, and only by it")
    if settings.verb != "train":
        ranks = {f"job.{key}": getattr(settings.job, key) for key in ("nodes", "processes_per_node")}
        for key, value in {"launch": settings.launch, **ranks}.items():
            if value not in (None, 1):
                raise RecipeError(f"{path}: stages.{name}.{key}: without effect on the verb {settings.verb}")
    if settings.verb == "tokenizer" and settings.show:
        raise RecipeError(f"{path}: stages.{name}.show: the verb tokenizer has no metrics")
    if "run_dir" in settings.set:
        raise RecipeError(
            f"{path}: stages.{name}.set.run_dir: without effect, because a stage has the directory OUT/{name}; "
            "set out of the pipeline"
        )
    near = path.parent / settings.recipe
    try:
        overrides = tuple(f"{key}={json.dumps(replaced(value))}" for key, value in settings.set.items())
    except TypeError as error:
        raise RecipeError(f"{path}: stages.{name}.set: {error}; put dates in quotes") from None
    model = None if settings.model is None else replaced(settings.model)
    recipe = str(near.absolute()) if near.is_file() else settings.recipe
    if settings.launch is not None and (path.parent / settings.launch).is_file():
        settings = settings.model_copy(update={"launch": str((path.parent / settings.launch).absolute())})
    return Stage(name, settings, out / name, recipe, overrides, model, tuple(used))


def _check_recipe(stage: Stage, recipe: Recipe, at: str) -> None:
    """Raises RecipeError if the stage would not write its output, or not evaluate what it shows. at: its place."""
    if recipe.data.all_folds and stage.settings.verb != "tokenizer":
        raise RecipeError(
            f"{at}: data.folds: a stage is one run. Choose a fold with data.fold, or use data.validation instead"
        )
    if stage.settings.show and not recipe.validated:
        raise RecipeError(f"{at}.show: the recipe has no validation rows; set data.validation")
    for metric in stage.settings.show:
        if metric not in (*recipe.metric_names, *_UNLISTED):
            raise RecipeError(f"{at}.show: {no_metric(recipe, metric)}")


def run_here(pipeline: Pipeline, execute: Callable[[Stage, Sequence[str]], int], options: Sequence[str]) -> int:
    """Do all stages that are not done, in order; the exit code of the one that failed or was stopped, or 0.

    Args:
        execute: runs `ptft` for one stage with these further options; its exit code.
        options: those of `ptft train` for stages without a launch config.

    Raises:
        RecipeError: a stage would replace the output of another version of it.
    """
    pipeline.set_aside()
    for stage in pipeline.stages:
        if pipeline.is_done(stage):
            say(f"{stage.name}: already done in {stage.folder}")
            continue
        pipeline.require_startable(stage)
        pipeline.begin(stage)
        code = execute(stage, stage_options(stage, options))
        if code != EXIT_FINISHED:
            again = " without --again" if pipeline.again else ""
            say(f"{stage.name} ended with exit code {code}. The same command{again} continues with it.")
            return code
    return EXIT_FINISHED


def table(pipeline: Pipeline) -> Iterator[str]:
    """The metrics that the stages show: those of the first and of the last evaluation."""
    yield f"{'stage':12} {'metric':24} {'first':>9} {'last':>9}"
    for stage in pipeline.stages:
        for metric in stage.settings.show:
            first, last = _metric(stage, metric)
            yield f"{stage.name:12} {metric:24} {first:>9} {last:>9}"


def _metric(stage: Stage, name: str) -> tuple[str, str]:
    if stage.settings.verb == "evaluate":
        value = json.loads(stage.output.read_text(encoding="utf-8"))["metrics"].get(f"eval/{name}")
        return "", "none" if value is None else f"{value:.4g}"
    lines = (stage.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [row[f"eval/{name}"] for line in lines if f"eval/{name}" in (row := json.loads(line))]
    return (f"{values[0]:.4g}", f"{values[-1]:.4g}") if values else ("", "none")


def stage_options(stage: Stage, options: Sequence[str]) -> list[str]:
    """The options of a stage's command: of `options`, with the launch config of the stage in place of that there."""
    if not stage.trains:
        return []
    kept = list(options)
    if stage.settings.launch is None:
        return kept
    if "--launch" in kept:
        at = kept.index("--launch")
        del kept[at : at + 2]
    return ["--launch", stage.settings.launch, *kept]


def _inputs(stage: Stage, loaded: Loaded) -> str:
    try:
        return input_fingerprint(loaded)
    except PtftError as error:
        error.args = (f"stage {stage.name}: {error}",)
        raise


def _has_ended_well(stage: Stage) -> bool:
    if not stage.output.exists():
        return False
    return not stage.trains or read_json(stage.folder / "result.json").get("status") == "finished"


def _recorded(stage: Stage) -> str | None:
    return read_json(stage.folder / RECORD).get("key")


def _place(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place)) or "pipeline"

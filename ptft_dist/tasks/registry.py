"""The table of all tasks: settings, encoder and class. Nothing here imports torch.

A task is a folder `tasks/<name>/` and a line in TASKS. The recipe's schema, `ptft config`, `prepare` and the trainer
follow from the table; no module outside of `tasks/` names a task.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal, cast

from pydantic import create_model

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.task_settings import TaskSettings
from ptft_dist.tasks.classification.settings import ClassificationSettings
from ptft_dist.tasks.clm.settings import ClmSettings
from ptft_dist.tasks.dpo.settings import DpoSettings
from ptft_dist.tasks.grpo.settings import GrpoSettings
from ptft_dist.tasks.kto.settings import KtoSettings
from ptft_dist.tasks.mlm.settings import MlmSettings
from ptft_dist.tasks.mlm_nsp.settings import MlmNspSettings
from ptft_dist.tasks.plm.settings import PlmSettings
from ptft_dist.tasks.ppo.settings import PpoSettings
from ptft_dist.tasks.prompting.settings import PromptingSettings
from ptft_dist.tasks.question_answering.settings import QuestionAnsweringSettings
from ptft_dist.tasks.regression.settings import RegressionSettings
from ptft_dist.tasks.reward.settings import RewardSettings
from ptft_dist.tasks.rloo.settings import RlooSettings
from ptft_dist.tasks.seq2seq.settings import Seq2SeqSettings
from ptft_dist.tasks.sft.settings import SftSettings
from ptft_dist.tasks.span_corruption.settings import SpanCorruptionSettings
from ptft_dist.tasks.token_classification.settings import TAG_LETTERS, TokenClassificationSettings


@dataclass(frozen=True)
class TaskSpec:
    """One task. task, encoder: import strings `module:attribute`, relative to the task's folder; a leading dot leads to
    `tasks/`."""

    settings: type[TaskSettings]
    """The recipe's section of the task; its class attributes say what the task supports."""
    task: str
    """The class with collate, loss, predictions and metrics."""
    encoder: str = ".common.documents:DocumentRows"
    """The class that turns records into examples; the default is that of tasks on plain documents."""


TASKS: dict[str, TaskSpec] = {
    "clm": TaskSpec(ClmSettings, "task:CausalLM"),
    "mlm": TaskSpec(MlmSettings, "task:MaskedLM"),
    "mlm_nsp": TaskSpec(MlmNspSettings, "task:MaskedLMWithPairs", "encode:PairRows"),
    "plm": TaskSpec(PlmSettings, "task:PermutedLM"),
    "span_corruption": TaskSpec(SpanCorruptionSettings, "task:SpanCorruption"),
    "seq2seq": TaskSpec(Seq2SeqSettings, "task:Seq2Seq", "encode:Seq2SeqRows"),
    "sft": TaskSpec(SftSettings, "task:SupervisedFineTuning", "encode:ConversationRows"),
    "classification": TaskSpec(ClassificationSettings, "task:Classification", "encode:ClassificationRows"),
    "regression": TaskSpec(RegressionSettings, "task:Regression", "encode:RegressionRows"),
    "token_classification": TaskSpec(TokenClassificationSettings, "task:TokenClassification", "encode:TaggedRows"),
    "question_answering": TaskSpec(QuestionAnsweringSettings, "task:QuestionAnswering", "encode:QuestionRows"),
    "reward": TaskSpec(RewardSettings, "task:RewardModelling", "encode:RewardRows"),
    "ppo": TaskSpec(PpoSettings, "task:Ppo", ".common.prompt_rows:PromptRows"),
    "grpo": TaskSpec(GrpoSettings, "task:Grpo", ".common.prompt_rows:PromptRows"),
    "rloo": TaskSpec(RlooSettings, "task:Rloo", ".common.prompt_rows:PromptRows"),
    "dpo": TaskSpec(DpoSettings, "task:DirectPreference", ".common.preference_rows:PreferenceRows"),
    "kto": TaskSpec(KtoSettings, "task:KahnemanTversky", "encode:LabelledAnswerRows"),
    "prompting": TaskSpec(PromptingSettings, "task:Prompting", "encode:PromptedRows"),
}


@cache
def recipe_class() -> type[Recipe]:
    """The recipe's schema: the sections that all tasks share, and one section for each task."""
    sections: dict[str, Any] = {name: (spec.settings, spec.settings()) for name, spec in TASKS.items()}
    return create_model(
        "Recipe",
        __base__=Recipe,
        __doc__=Recipe.__doc__,
        task=(cast(Any, Literal[tuple(TASKS)]), Recipe.model_fields["task"]),
        **sections,
    )


_ENDINGS = {
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "mlm",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "clm",
    "LMHeadModel": "clm",
}


def task_of(architecture: str, labels: list[str], *, multi_label: bool) -> tuple[str, dict[str, Any]] | None:
    """The task that a transformers class was made for, and its settings; None if it is unknown.

    labels: the names of the network's labels, in the order of their ids.
    """
    if architecture.endswith("ForSequenceClassification"):
        if len(labels) == 1:
            return "regression", {}
        return "classification", {"labels": labels, "multi_label": multi_label}
    if architecture.endswith("ForTokenClassification"):
        prefixes = {label[: label.find("-") + 1] for label in labels if label != "O"}  # "" without a hyphen
        schemes = (name for name, letters in TAG_LETTERS.items() if prefixes <= {f"{letter}-" for letter in letters})
        return "token_classification", {"labels": labels, "scheme": next(schemes, "plain")}
    return next(((task, {}) for ending, task in _ENDINGS.items() if architecture.endswith(ending)), None)


def task_class(name: str) -> Any:
    """The class that implements the task."""
    return _imported(name, TASKS[name].task)


def encoder_class(name: str) -> Any:
    """The class that encodes the task's records."""
    return _imported(name, TASKS[name].encoder)


def _imported(name: str, target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(import_module(f".{module}", f"{__package__}.{name}"), attribute)

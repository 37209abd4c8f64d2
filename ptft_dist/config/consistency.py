"""Checks across the sections of a recipe: settings without effect, and combinations that cannot run.

These checks depend on the recipe only, and run before data, network or accelerator are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ptft_dist.config.data_section import MixingSection
from ptft_dist.config.section import KeyPath, Problem, is_default
from ptft_dist.config.task_settings import DocumentSettings

if TYPE_CHECKING:
    from ptft_dist.config.recipe import Recipe

_NO_EFFECT = "has no effect here:"


def problems(recipe: Recipe) -> Iterator[Problem]:
    """All problems, in no particular order."""
    if recipe.tokenizer.path is None and recipe.tokenizer.train is None:
        text = "required with model.config: train one with tokenizer.train, or name one with tokenizer.path"
        yield Problem(("tokenizer",), text)
    if recipe.model.dtype not in ("auto", "fp32", recipe.train.precision) and recipe.model.path is not None:
        dtype = recipe.model.dtype
        yield Problem(("model", "dtype"), f"{dtype} needs train.precision: {dtype}, which is {recipe.train.precision}")
    if recipe.tokenizer.init_added is not None and (recipe.model.path is None or not recipe.adds_tokens):
        text = f"{_NO_EFFECT} it needs model.path, and added tokens: tokenizer.add or tokenizer.extend"
        yield Problem(("tokenizer", "init_added"), text)
    yield from _task(recipe)
    yield from _sources(recipe)
    yield from _continual(recipe)
    yield from _batch(recipe)
    yield from _evaluation(recipe)


def _task(recipe: Recipe) -> Iterator[Problem]:
    """Settings of the task's section, and features that the task does not support."""
    task, settings, sections = recipe.task, recipe.settings, recipe.task_sections()
    for name, default in sections.items():
        if name != task and getattr(recipe, name) != default:
            yield Problem((name,), f"{_NO_EFFECT} the task is {task}")
    if recipe.distillation is not None and not settings.distillable:
        supported = ", ".join(name for name, section in sections.items() if section.distillable)
        yield Problem(("distillation",), f"{_NO_EFFECT} it needs one of the tasks {supported}")
    elif recipe.distillation is not None and getattr(settings, "head", None) == "fused":
        text = "the fused head computes no logits, and distillation needs them; remove the key, or set logits"
        yield Problem((task, "head"), text)
    if recipe.data.augment and not settings.augmentable:
        supported = ", ".join(name for name, section in sections.items() if section.augmentable)
        yield Problem(("data", "augment"), f"{_NO_EFFECT} it needs one of the tasks {supported}")
    if recipe.data.mixing is not None:
        yield from _mixing(recipe, recipe.data.mixing)
    if settings.fixed_texts is not None:
        for number, step in enumerate(recipe.data.steps):
            if step.edits:
                text = f"{step.name} changes texts, which task {task} does not allow: {settings.fixed_texts}"
                yield Problem(("data", "steps", number), text)
    if settings.compared_roles:
        columns = ", ".join(settings.compared_roles)
        for number, step in enumerate(recipe.data.steps):
            if step.near_dedup is not None:
                text = f"near_dedup compares texts only, and rows of one text differ in {columns}; use exact_dedup"
                yield Problem(("data", "steps", number), text)
    for number, step in enumerate(recipe.data.steps if settings.linked_texts else ()):
        if step.exact_dedup is not None and (unit := step.exact_dedup.unit) != "document":
            text = f"exact_dedup drops {unit}s of one text only, and {settings.linked_texts}; use unit: document"
            yield Problem(("data", "steps", number), text)
    if recipe.data.bad_rows != "stop" and isinstance(settings, DocumentSettings):
        yield Problem(("data", "bad_rows"), f"{_NO_EFFECT} it needs a task with rows, and not {task}")
    if recipe.tokenizer.train is None:
        for name in settings.only_with_trained_tokenizer:
            if not is_default(settings, name):
                yield Problem((task, name), f"{_NO_EFFECT} it needs tokenizer.train")
    for name, text in settings.length_problems(recipe.data.max_length):
        yield Problem((task, name), text)
    for name, text in settings.batch_problems(recipe.batch.global_size):
        yield Problem((task, name), text)
    if settings.rollout_prompts is not None:
        if recipe.train.max_tokens is not None:
            yield Problem(("train", "max_tokens"), f"task {task} makes its own tokens; set max_steps or epochs")
        if recipe.data.workers is not None:
            text = f"{_NO_EFFECT} task {task} learns from its own responses, which no process loads"
            yield Problem(("data", "workers"), text)
        if recipe.continual is not None:
            yield Problem(
                ("continual",), f"{_NO_EFFECT} task {task} stays near model.path by its own setting {task}.kl"
            )


def _sources(recipe: Recipe) -> Iterator[Problem]:
    """Keys of sources that the task does not use, and unknown roles."""
    task, settings = recipe.task, recipe.settings
    documents = isinstance(settings, DocumentSettings)
    named = {"data.train": recipe.data.train, "data.validation": recipe.data.validation, **recipe.old_data}
    for key, sources in named.items():
        for index, source in enumerate(sources if isinstance(sources, list) else ()):
            path: KeyPath = (*key.split("."), index)
            if source.fields and documents:
                text = f"{_NO_EFFECT} task {task} reads one column; name it with field"
                yield Problem((*path, "fields"), text)
            if source.field and not documents:
                yield Problem((*path, "field"), f"{_NO_EFFECT} name the columns of task {task} with fields")
            for role in source.fields if not documents else ():
                if role not in settings.roles:
                    text = f"task {task} has no role {role!r}, only {_choice(role, settings.roles)}"
                    yield Problem((*path, "fields", role), text)


def _continual(recipe: Recipe) -> Iterator[Problem]:
    """Settings against forgetting that have no effect, or cannot be combined with others."""
    continual, model = recipe.continual, recipe.model
    if continual is None:
        return
    if model.path is None:
        text = f"{_NO_EFFECT} it needs model.path, because a network with random weights has nothing to forget"
        yield Problem(("continual",), text)
        return
    for name in continual.penalties:
        path = ("continual", name)
        if model.adapt.adds_adapter:
            text = f"{_NO_EFFECT} model.adapt: {model.adapt.method} freezes the weights of model.path and trains others"
            yield Problem(path, text + ". Use model.adapt: full, last_layers, match or bitfit, or remove the section")
        if recipe.adds_tokens:
            text = "tokens are added, and their embeddings have no old values. Start from a model that has these tokens"
            yield Problem(path, text)
        if recipe.train.precision == "fp16":
            text = "its gradient is not scaled as fp16 needs; use train.precision: bf16 or fp32"
            yield Problem(path, text)
    if continual.ewc is not None and getattr(recipe.settings, "has_reference", False):
        text = f"the loss of task {recipe.task} compares with a reference, and says nothing about the old network alone"
        yield Problem(("continual", "ewc"), f"{text}. Use l2_sp or replay")
    if continual.ewc is not None and model.new_head:
        text = "model.new_head: the new head cannot do the old task, so its Fisher information says nothing. Use the "
        yield Problem(("continual", "ewc"), text + "labels of model.path and its head, or l2_sp")


def _batch(recipe: Recipe) -> Iterator[Problem]:
    """Batch sizes that are invalid for any number of processes."""
    batch, length = recipe.batch, recipe.longest_row
    row = f"data.max_length: {recipe.data.max_length}"
    if recipe.settings.texts_per_row > 1:
        row += f", {recipe.settings.texts_per_row} texts"
    rows, tokens, micro_size = batch.global_size, batch.global_tokens, batch.micro_size
    if batch.micro_tokens is not None and batch.micro_tokens < length:
        text = f"{batch.micro_tokens} is less than one row ({row})"
        yield Problem(("batch", "micro_tokens"), text)
    if tokens is not None and tokens < length:
        yield Problem(("batch", "global_tokens"), f"{tokens} is less than one row ({row})")
        return
    if tokens is not None and recipe.settings.full_rows:
        rows = tokens // length
        if tokens % length:
            near = f"{rows * length}, {(rows + 1) * length}"
            text = f"{tokens} is not a multiple of data.max_length ({length}); the nearest multiples: {near}"
            yield Problem(("batch", "global_tokens"), text)
            return
    if rows is None or micro_size is None or rows % micro_size == 0:
        return
    low = rows // micro_size * micro_size
    sizes = " or ".join(str(size) for size in (low, low + micro_size) if size)
    micro = nearest_divisor(rows, micro_size)
    if tokens is not None:
        text = f"{tokens} tokens are {rows} rows of data.max_length ({length}), not a multiple of batch.micro_size "
        yield Problem(("batch", "global_tokens"), text + f"({micro_size}); set batch.micro_size to {micro}")
    else:
        text = f"{rows} is not a multiple of batch.micro_size ({micro_size}); set batch.global_size to {sizes}"
        yield Problem(("batch", "global_size"), text + f", or batch.micro_size to {micro}")


def _evaluation(recipe: Recipe) -> Iterator[Problem]:
    """Settings that need validation data or regular evaluations, and unknown metrics."""
    evaluation, settings = recipe.eval, recipe.settings
    if recipe.eval.metric not in recipe.metric_names:
        yield Problem(("eval", "metric"), no_metric(recipe, recipe.eval.metric))
    if not recipe.validated:
        for name in type(evaluation).model_fields:
            if not is_default(evaluation, name):
                yield Problem(("eval", name), f"{_NO_EFFECT} it needs data.validation")
        own = (*settings.evaluation_only, *(["generation"] if hasattr(settings, "generation") else []))
        for name in own:
            if not is_default(settings, name):
                yield Problem((recipe.task, name), f"{_NO_EFFECT} it needs data.validation")
    if evaluation.every is None:
        if recipe.save.best:
            yield Problem(("save", "best"), f"{_NO_EFFECT} it needs eval.every")
        if evaluation.patience is not None:
            yield Problem(("eval", "patience"), f"{_NO_EFFECT} it needs eval.every")


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` that is nearest to `wanted`; of two equally near ones, the smaller."""
    small = [n for n in range(1, min(math.isqrt(number), 10**6) + 1) if number % n == 0]
    return min({*small, *(number // n for n in small)}, key=lambda n: (abs(n - wanted), n))


def no_metric(recipe: Recipe, name: str) -> str:
    """The message for a name that is none of the recipe's metrics."""
    return f"task {recipe.task} has no metric {name!r}, only {_choice(name, recipe.metric_names)}"


def _choice(word: str, names: tuple[str, ...]) -> str:
    near = get_close_matches(word, names, n=1)
    return ", ".join(names) + (f"; did you mean {near[0]}?" if near else "")


def _mixing(recipe: Recipe, mixing: MixingSection) -> Iterator[Problem]:
    """Keys that data.mixing cannot be used with."""
    key = ("data", "mixing")
    if recipe.train.epochs is not None:
        yield Problem(
            ("train", "epochs"), "with data.mixing each source has its own epochs; set max_steps or max_tokens"
        )
    if recipe.continual is not None and recipe.continual.replay is not None:
        yield Problem(key, "cannot be used with continual.replay: make the old data a source with a weight")
    if recipe.settings.rollout_prompts is not None:
        yield Problem(key, f"task {recipe.task} does not mix sources of prompts; remove it")
    if mixing.schedule is not None and recipe.batch.global_size is None:
        yield Problem((*key, "schedule"), "needs updates of equal numbers of rows: set batch.global_size")

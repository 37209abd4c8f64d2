"""Answers to new rows, one for each row of a file and in its order, for `ptft predict`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.config.recipe import ModelSection, Recipe, Source
from ptft_dist.config.resolve import batch_shape
from ptft_dist.data.cache import HashMemo, cache_root
from ptft_dist.data.cleaning.edits import Edits
from ptft_dist.data.encoder import EncoderContext, LeftOut, Outcome, RowError
from ptft_dist.data.example_store import META, meta_bytes
from ptft_dist.data.formats import Record
from ptft_dist.data.prepare import records_of
from ptft_dist.data.report import RowTally
from ptft_dist.data.row_encoder import RowEncoder, require_all
from ptft_dist.data.sources import check_sources, read_records
from ptft_dist.data.store import Row
from ptft_dist.data.stream import take_survey
from ptft_dist.engine import Engine, complete_deepspeed_config, planned_kind
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.judging.journal import Journal
from ptft_dist.judging.rows import RowList
from ptft_dist.judging.target import Target, find_target, source_of
from ptft_dist.launch.environment import Place, deepspeed_config_of_launch
from ptft_dist.networks.adapt.reading import head_labels
from ptft_dist.networks.facts import labels_of
from ptft_dist.networks.load import local_or_hub, read_config
from ptft_dist.reporting.messages import progress, say, warn
from ptft_dist.reporting.output import check_writable, write_file
from ptft_dist.reporting.tables import SEPARATORS, table
from ptft_dist.run import libraries_restored
from ptft_dist.session import run_probe
from ptft_dist.session.trained_network import TrainedNetwork
from ptft_dist.tasks.protocol import EVALUATION_EPOCH
from ptft_dist.tasks.registry import encoder_class
from ptft_dist.training.batches import Shape, micro_batch

CHUNK = 1024
"""Rows of each process that are encoded and sorted by length together. An interruption loses at most one chunk."""
ANSWER = "prediction"
"""The field that is added to a row."""


@dataclass(frozen=True)
class Predictions:
    """The result of a prediction, equal on all ranks."""

    out: Path
    rows: int
    """Number of rows in the file."""
    unanswered: int
    """Rows without an answer, such as a sentence without words; their prediction says why."""


def predict(
    model: str | Path,
    source: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    place: Place,
    *,
    file: Path,
    out: Path,
) -> Predictions:
    """Answer the rows of a file; see api.predict."""
    if not file.is_file():
        raise DataError(f"{file} does not exist. Give a file with rows")
    if out.absolute() == file.absolute():
        raise RecipeError(f"{out}: this is the file with the rows. Name another file for the answers")
    target = find_target(model, source, overrides, file)
    kind = encoder_class(target.loaded.recipe.task)
    task, settings = target.loaded.recipe.task, target.loaded.recipe.settings.for_answers()
    if not kind.answer_roles or settings is None:
        these = " with these settings" * bool(kind.answer_roles)
        raise RecipeError(f"{model}: task {task} gives no answers to rows{these}. {_INSTEAD}")
    if place.is_main:
        check_writable(out)
    with libraries_restored(), ExitStack() as at_end:
        predictor = Predictor(target, place, kind)
        count = predictor.check(file)
        stat = file.stat()
        identity = [target.files(), str(file.absolute()), stat.st_size, stat.st_mtime_ns]
        identity += [predictor.recipe.own_values(), predictor.edits_contents()]
        journal = Journal(out.with_name(f".{out.name}.journal"), identity) if place.is_main else None
        if journal is not None:
            at_end.callback(journal.close)
        predictor.start()
        done = predictor.engine.gather_objects(None if journal is None else journal.count)[0]
        if done:
            say(f"going on after {done:,} rows of an interrupted prediction")
        with progress("predicting", count, "rows") as shown:
            shown.advance(done)
            for chunk, answers in predictor.answers(file, done):
                if journal is not None:
                    journal.add(*(_line(record, answers[i]) for i, record in enumerate(chunk)))
                shown.advance(len(chunk))
        unanswered = 0
        if journal is not None:
            unanswered = sum(list(row[ANSWER]) == ["problem"] for row in journal.values())
            separator = SEPARATORS.get(out.suffix)
            write_file(out, journal.lines() if separator is None else table(journal.values, separator))
            journal.remove()
            if unanswered:
                warn(f"{unanswered:,} of {count:,} rows have no answer; their {ANSWER} says why")
        unanswered = predictor.engine.gather_objects(unanswered)[0]
        predictor.engine.barrier()
        predictor.engine.close()
    return Predictions(out, count, unanswered)


_INSTEAD = "For texts use ptft generate, for rewards ptft score, for metrics ptft evaluate"


def _line(record: Record, answer: Mapping[str, Any]) -> dict[str, Any]:
    return {**record.values, ANSWER: answer}


class Predictor:
    """A trained network with what turns rows without answers into its inputs."""

    engine: Engine

    def __init__(self, target: Target, place: Place, kind: type[RowEncoder]) -> None:
        """Check model, recipe and launch config. Needs no other process.

        Raises:
            RecipeError: the model does not fit the recipe.
        """
        loaded = target.for_reading(place.world_size)
        settings = {loaded.recipe.task: loaded.recipe.settings.for_answers()}
        loaded = replace(loaded, recipe=loaded.recipe.model_copy(update=settings))
        self.recipe, self.base, self.kind = loaded.recipe, loaded.base, kind
        section = local_or_hub(self.recipe.model, self.base)
        # What the encoder discovers about the tokenizer is added before the task is built, which also reads it.
        self.survey = dict(target.survey or _survey_of(self.recipe, section))
        if kind.survey_of_recipe:
            check_sources(self.recipe, self.base)
            self.survey = take_survey(self.recipe, records_of(self.recipe, self.base, kind), kind)
        self.zero_config = deepspeed_config_of_launch()
        self.shape = batch_shape(self.recipe, place.world_size)
        backend = planned_kind(place.world_size, self.zero_config)
        self.trained = TrainedNetwork(loaded, target.tokenizer_directory(), self.survey, backend, lambda: 1)
        self.context = EncoderContext.of(self.recipe, self.trained.tokenizer, self.survey)
        self.encoder = kind(self.context)
        asked = tuple(role for role in self.recipe.settings.text_roles if role not in kind.answer_roles)
        self.edits = Edits(self.recipe, self.base, asked)

    def edits_contents(self) -> list[Any]:
        """The contents of files that the steps of data.steps read."""
        memo = HashMemo(cache_root(self.recipe.data.cache_dir, self.base.absolute()) / "hashes.json")
        return self.edits.contents(memo)

    def check(self, file: Path) -> int:
        """The number of rows of a file. Raises DataError, with all of the first bad rows."""
        bad, count, probed = RowTally(), 0, False
        for record in self._records(file):
            count += 1
            if ANSWER in record.values:
                raise DataError(
                    f"{record.where}: the row has a field {ANSWER!r} already, which the answer would replace. Rename it"
                )
            try:
                require_all(record.values, self._roles())
                asked = self._unanswered(record)
                self.kind.check(self.recipe.settings, asked)
            except LeftOut:
                bad.good(record.where)
            except RowError as problem:
                bad.add(record.where, problem)
            else:
                bad.good(record.where)
                if not probed:
                    self.encoder.outcomes([asked])
                    self.survey |= self.encoder.discovered
                    probed = True
        if bad.count:
            raise DataError(bad.message(skippable=False))
        return count

    def _records(self, file: Path) -> Iterator[Record]:
        """The rows of a file, read like the recipe's sources. Columns with answers need not exist."""
        roles = self.kind.answer_roles
        values = source_of(file, self.recipe)
        values["fields"] = {role: name for role, name in values.get("fields", {}).items() if role not in roles}
        return read_records(Source.model_validate(values).named("data.train.0"), self.base, self._roles())

    def _roles(self) -> list[str]:
        """The columns that every row needs."""
        return [role for role in self.kind.required(self.recipe.settings) if role not in self.kind.answer_roles]

    def _unanswered(self, record: Record) -> Record:
        """What the network reads of a row: after the steps of data.steps that edit, with a made-up answer.

        Raises:
            LeftOut: nothing is left after the steps.
            RowError: there is nothing to answer.
        """
        values = self.edits(record).values
        return Record(self.kind.unanswered(self.recipe.settings, self.context.survey, values), record.where)

    def _outcomes(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcomes of rows that `check` has accepted."""
        asked: list[Record | Outcome] = []
        for record in records:
            try:
                asked.append(self._unanswered(record))
            except LeftOut as reason:
                asked.append(Outcome(dropped=str(reason)))
        encoded = iter(self.encoder.outcomes([each for each in asked if isinstance(each, Record)]))
        return [each if isinstance(each, Outcome) else next(encoded) for each in asked]

    def start(self) -> None:
        """Form the process group, and build and place the network."""
        recipe, config = self.recipe, None
        if self.zero_config is not None:
            config = complete_deepspeed_config(
                self.zero_config,
                recipe.train.precision,
                recipe.optim.max_grad_norm,
                self.shape.micro_size or 1,
                self.shape.accumulation,
            )
        self.engine = Engine(recipe.train.precision, config)
        self.trained.build(self.engine)
        self.engine.prepare_reading(self.trained.model)
        run_probe(self.engine, self.trained.task)

    def answers(self, file: Path, done: int) -> Iterator[tuple[list[Record], dict[int, Mapping[str, Any]]]]:
        """The rows after the first `done` in chunks, with the answer to each row of a chunk; on rank 0 only."""
        records = islice(self._records(file), done, None)
        rank, ranks = self.engine.dp_rank, self.engine.dp_size
        while chunk := list(islice(records, CHUNK * ranks)):
            found: dict[int, Mapping[str, Any]] = {}
            for part in self.engine.gather_on_main(self._answers(chunk, range(rank, len(chunk), ranks))):
                found |= part
            yield chunk, found

    def _answers(self, chunk: Sequence[Record], numbers: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        """The answers to the rows with these numbers. All ranks must call it together."""
        answers: dict[int, Mapping[str, Any]] = {}
        rows: list[Row] = []
        owners: list[int] = []
        lengths: list[int] = []
        outcomes = self._outcomes([chunk[i] for i in numbers])
        for number, outcome in zip(numbers, outcomes, strict=True):
            if outcome.problem is not None:
                raise DataError(f"{chunk[number].where}: {outcome.problem}")
            if outcome.dropped is not None:
                answers[number] = {"problem": outcome.dropped}
            for example in outcome.examples:
                columns = dict(example.columns)
                ids = np.asarray(columns.pop("input_ids")).astype(np.int64)
                columns = {name: x if x.dtype.kind == "f" else x.astype(np.int64) for name, x in columns.items()}
                columns[META] = np.frombuffer(meta_bytes(example.meta), np.uint8)
                rows.append(Row(ids, np.zeros(1, np.int64), columns))
                owners.append(number)
                lengths.append(len(ids))
        predictions = self._forward(rows, lengths)
        windows: dict[int, list[int]] = {}
        for i, owner in enumerate(owners):
            windows.setdefault(owner, []).append(i)
        for owner, indices in windows.items():
            answer = self.trained.task.answer([predictions[i] for i in indices], [rows[i] for i in indices])
            answers[owner] = answer or {}
        return answers

    def _forward(self, rows: list[Row], lengths: list[int]) -> dict[int, Any]:
        """The predictions for rows, by index. All ranks make the same number of forward passes."""
        task, engine = self.trained.task, self.engine
        micro_size = self.recipe.eval.micro_size
        shape = Shape(0, 1, micro_size, None if micro_size is not None else self.shape.micro_tokens, True)
        parts = [part for (part,) in shape.split(np.array(lengths))] if rows else []
        plans = engine.gather_objects((len(parts), rows[0] if rows else None))
        # A rank that has no more rows takes part in the passes of others with a dummy batch, whose row may be theirs.
        read = RowList(rows or [row for _, row in plans if row is not None][:1], lengths)
        predictions: dict[int, Any] = {}
        keys = np.stack([np.full(len(read), EVALUATION_EPOCH), np.arange(len(read))], axis=1)
        with engine.evaluating():
            for part in [*parts, *[np.array([], int)] * (max(count for count, _ in plans) - len(parts))]:
                batch = micro_batch(read, keys[part], keys[0], task.collate)
                found = engine.forward(task.predict, batch.inputs)
                if len(part):
                    predictions |= dict(zip(batch.rows, task.predictions(found), strict=False))
        return predictions


def _survey_of(recipe: Recipe, section: ModelSection) -> dict[str, Any]:
    """What is known about the rows that a network was trained on: its labels.

    Their frequencies are made up. They affect the weights in the loss, and no answer.
    """
    adapter = section.adapt.adapter
    labels = (head_labels(adapter) if adapter is not None else []) or labels_of(read_config(section, {}))
    unanswerable = int(bool(getattr(recipe.settings, "no_answer_margin", 0)))
    return {"labels": labels, "frequencies": [1] * len(labels), "rows": len(labels), "unanswerable": unanswerable}

"""What an evaluation finds about each row and each example, kept in a journal until it is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptft_dist.data.store import Row, Store
from ptft_dist.engine import Engine
from ptft_dist.judging.journal import Journal
from ptft_dist.launch.environment import Place
from ptft_dist.reporting.messages import say
from ptft_dist.tasks.protocol import Judged, Task
from ptft_dist.training.validation import PartResult

Decode = Callable[[list[int]], str]
"""Token ids -> text without special tokens."""


class RowResults:
    """Keeps the results of this rank's rows, in a journal beside `out` so that an interruption loses nothing."""

    def __init__(self, out: Path | None, identity: Any, place: Place) -> None:
        self._results: list[PartResult] = []
        self._journal: Journal | None = None
        self._is_main = place.is_main
        if out is not None:
            self._journal = Journal(out.with_name(f".{out.name}.rank-{place.rank}"), identity)

    def restored(self, engine: Engine) -> Sequence[PartResult]:
        """The results of an interrupted evaluation, as many as every rank has."""
        if self._journal is None:
            return []
        count = min(engine.gather_objects(self._journal.count))
        self._results = [_from_json(value, engine.device) for value in self._journal.values()][:count]
        self._journal.keep(count)
        if count:
            say(f"going on after {count:,} micro-batches of an interrupted evaluation")
        return self._results

    def keep(self, result: PartResult) -> None:
        self._results.append(result)
        if self._journal is not None:
            self._journal.add(_to_json(result))

    def close(self) -> None:
        """Keep the journal for the next start."""
        if self._journal is not None:
            self._journal.close()

    def remove(self) -> None:
        """Delete the journals, also those of an interrupted evaluation on more processes."""
        if self._journal is None:
            return
        self._journal.remove()
        if self._is_main:
            own = self._journal.path
            for path in own.parent.iterdir():
                if path.name.startswith(own.name.removesuffix("0")):
                    path.unlink(missing_ok=True)

    def examples(
        self, engine: Engine, store: Store, numbered: str | None, task: Task, decode: Decode
    ) -> list[ExampleResult]:
        """What was found about each example of all ranks, in order; empty on other ranks than 0.

        numbered: `Encoder.numbered`, of rows that are parts of an example.
        """
        found: dict[int, _RowResult] = {}
        mine = [row for result in self._results for row in _rows(result)]
        for part in engine.gather_on_main(mine):
            found |= {row.number: row for row in part}
        groups: dict[Any, list[int]] = {}
        for number in sorted(found):
            groups.setdefault(number if numbered is None else store.row(number).meta[numbered], []).append(number)
        return [
            _example(task, decode, [found[n] for n in numbers], [store.row(n) for n in numbers])
            for numbers in groups.values()
        ]


class _RowResult(NamedTuple):
    number: int
    prediction: Any
    loss: tuple[float, float] | None


@dataclass(frozen=True)
class ExampleResult:
    """What was found about one example, which may have several rows."""

    row: int
    """The number of its first row, from 0."""
    text: str
    judged: Judged | None
    """None for tasks without answers."""
    values: Mapping[str, tuple[float, float]]
    """Name of a metric -> total and count."""
    targets: tuple[list[int], list[int]] | None
    """The tokens whose log-likelihood is the loss, after the token before them."""

    @property
    def id(self) -> str:
        """A hash of text and reference. The text is decoded from the tokens where rows do not keep it."""
        reference = None if self.judged is None else self.judged.reference
        return hashlib.blake2b(json.dumps([self.text, reference]).encode(), digest_size=8).hexdigest()

    def shown(self) -> dict[str, Any]:
        """Reference and answer, for people."""
        return {} if self.judged is None else {"reference": self.judged.reference, "answer": self.judged.answer}


def _rows(result: PartResult) -> list[_RowResult]:
    losses = [None] * len(result.rows) if result.row_losses is None else result.row_losses.tolist()
    predictions = result.predictions or [None] * len(result.rows)
    return [_RowResult(*each) for each in zip(result.rows, predictions, losses[: len(result.rows)], strict=True)]


def _example(task: Task, decode: Decode, results: Sequence[_RowResult], rows: Sequence[Row]) -> ExampleResult:
    answer = None if results[0].prediction is None else task.answer([each.prediction for each in results], rows)
    judged = None if answer is None else task.judge(answer, rows)
    values = {} if judged is None else {name: (float(a), float(b)) for name, (a, b) in judged.values.items()}
    losses = [each.loss for each in results if each.loss is not None]
    if losses:
        values = {"loss": (sum(loss for loss, _ in losses), sum(count for _, count in losses)), **values}
    ids = task.target_ids(rows[0]) if losses else None
    targets = None if ids is None else (task.before_targets(rows[0]).tolist(), ids.tolist())
    return ExampleResult(results[0].number, _text(rows, decode), judged, values, targets)


def _text(rows: Sequence[Row], decode: Decode) -> str:
    """The text of an example: as it was read, or as its tokens."""
    if "meta" in rows[0].columns:
        meta = rows[0].meta
        for key in ("text", "source"):
            if isinstance(text := meta.get(key), str) and len(rows) == 1:
                return text
    return "".join(decode(row.input_ids.tolist()) for row in rows)


def _to_json(result: PartResult) -> dict[str, Any]:
    return {
        "loss_sum": result.loss_sum.double().reshape(-1).tolist(),
        "metrics": {name: [float(a), float(b)] for name, (a, b) in result.metrics.items()},
        "counts": result.counts,
        "rows": result.rows,
        "predictions": result.predictions,
        "row_losses": None if result.row_losses is None else result.row_losses.tolist(),
    }


def _from_json(value: Mapping[str, Any], device: torch.device) -> PartResult:
    def tensor(numbers: Any) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=device)

    return PartResult(
        tensor(value["loss_sum"]),
        {name: (tensor(a), tensor(b)) for name, (a, b) in value["metrics"].items()},
        tuple(value["counts"]),
        tuple(value["rows"]),
        value["predictions"],
        None if value["row_losses"] is None else tensor(value["row_losses"]),
    )

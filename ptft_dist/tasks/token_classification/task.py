"""Token classification: predict a tag for each word (named entities, parts of speech, word boundaries)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.labelled_text import LabelledTextTask
from ptft_dist.tasks.common.losses import row_losses
from ptft_dist.tasks.common.padding import pad
from ptft_dist.tasks.common.scores.entities import entity_scores, entity_table
from ptft_dist.tasks.common.scores.labels import classification_scores
from ptft_dist.tasks.common.scores.tables import SHOWN_LABELS, class_table, confusion
from ptft_dist.tasks.protocol import IGNORE, Batch, Judged, LossOut, TaskSetup


class TokenClassification(LabelledTextTask):
    """Rows of token ids -> summed cross-entropy of the tags."""

    auto_class = AutoModelForTokenClassification

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.plain, self.labels = self.settings.scheme == "plain", list(setup.survey["labels"])

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:
        labels = setup.survey["labels"]
        return {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad texts and add targets: tag ids [B, T], -100 for tokens without a tag. The count is the number of tags."""
        targets = pad([row.columns["labels"] for row in rows], IGNORE, self.pad_multiple)
        tokens = sum(len(row.input_ids) for row in rows)
        return Batch({**self.text_inputs(rows), "targets": targets}, int((targets != IGNORE).sum()), tokens)

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The loss, and the most likely tag of each token as predictions [B, T]. The metric `accuracy` is over tokens
        with a tag."""
        return self._loss(self.logits(model, inputs), inputs["targets"])

    @staticmethod
    def _loss(logits: torch.Tensor, targets: torch.Tensor) -> LossOut:
        loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        predicted = logits.detach().argmax(-1)
        correct = (predicted == targets) & (targets != IGNORE)
        return LossOut(loss_sum, {"accuracy": (correct.sum(), (targets != IGNORE).sum())}, predicted)

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        logits, targets = self.logits(model, inputs), inputs["targets"]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
        return self._loss(logits, targets)._replace(row_losses=row_losses(losses, targets))

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores over sentences, joined from the pieces of split ones.

        The prediction for a word is that of its first token. A word without tokens is predicted as O; in the plain
        scheme it gets no tag and counts as wrong.
        """
        sentences: dict[int, tuple[list[str], list[str]]] = {}
        for number, tags in predictions.items():
            meta = row(number).meta
            gold, predicted = sentences.setdefault(meta["sentence"], ([], []))
            gold += meta["tags"]
            predicted += self._tags(tags, meta)
        all_gold, all_predicted = zip(*sentences.values(), strict=True)
        scores = self._plain_scores if self.plain else entity_scores
        return scores(all_gold, all_predicted), []

    def _tags(self, predicted: Sequence[int], meta: Mapping[str, Any]) -> list[str]:
        """The predicted tag of each word. predicted: tag ids of the tokens."""
        no_tag = "" if self.plain else "O"
        return [no_tag if at is None else self.labels[predicted[at]] for at in meta["at"]]

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:
        """The tag of each word of a sentence; empty in the plain scheme for a word without tokens."""
        return {"tags": [tag for p, row in zip(predictions, rows, strict=True) for tag in self._tags(p, row.meta)]}

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        gold = [tag for row in rows for tag in row.meta["tags"]]
        right = sum(a == b for a, b in zip(gold, answer["tags"], strict=True))
        return Judged(answer, gold, {"accuracy": (right, len(gold))})

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Scores of each type of entity, or in the plain scheme of each tag, and the confusion of tags."""
        gold, predicted = [each.reference for each in judged], [each.answer["tags"] for each in judged]
        unseen = {tag for side in (gold, predicted) for tags in side for tag in tags} - set(self.labels)
        names = [*self.labels, *sorted(unseen)]
        ids = {label: i for i, label in enumerate(names)}
        gold_ids, predicted_ids = (np.array([ids[tag] for tags in side for tag in tags]) for side in (gold, predicted))
        table = class_table(gold_ids, predicted_ids, names) if self.plain else entity_table(gold, predicted)
        tables: dict[str, Any] = {"labels": table}
        if len(names) <= SHOWN_LABELS:
            tables["confusion"] = confusion(gold_ids, predicted_ids, names)
        return tables

    def _plain_scores(self, gold: Sequence[list[str]], predicted: Sequence[list[str]]) -> dict[str, float]:
        ids = {label: i for i, label in enumerate(self.labels)}
        gold_ids, predicted_ids = ([ids.get(tag, -1) for tags in side for tag in tags] for side in (gold, predicted))
        scores = classification_scores(gold_ids, predicted_ids, len(ids))
        del scores["mcc"]
        return scores

"""Token classification: predict a tag for each word (named entities, parts of speech, word boundaries)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForTokenClassification

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.labelled_text import LabelledTextTask
from ptft_dist.tasks.common.padding import pad
from ptft_dist.tasks.common.scores.entities import entity_scores
from ptft_dist.tasks.common.scores.labels import classification_scores
from ptft_dist.tasks.protocol import IGNORE, Batch, LossOut, TaskSetup


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
        logits, targets = self.logits(model, inputs), inputs["targets"]
        loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        predicted = logits.detach().argmax(-1)
        correct = (predicted == targets) & (targets != IGNORE)
        return LossOut(loss_sum, {"accuracy": (correct.sum(), (targets != IGNORE).sum())}, predicted)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores over sentences, joined from the pieces of split ones.

        The prediction for a word is that of its first token. A word without tokens is predicted as O; in the plain
        scheme it gets no tag and counts as wrong.
        """
        no_tag = "" if self.plain else "O"
        sentences: dict[int, tuple[list[str], list[str]]] = {}
        for number, tags in predictions.items():
            meta = row(number).meta
            gold, predicted = sentences.setdefault(meta["sentence"], ([], []))
            gold += meta["tags"]
            predicted += [no_tag if at is None else self.labels[tags[at]] for at in meta["at"]]
        all_gold, all_predicted = zip(*sentences.values(), strict=True)
        scores = self._plain_scores if self.plain else entity_scores
        return scores(all_gold, all_predicted), []

    def _plain_scores(self, gold: Sequence[list[str]], predicted: Sequence[list[str]]) -> dict[str, float]:
        ids = {label: i for i, label in enumerate(self.labels)}
        gold_ids, predicted_ids = ([ids.get(tag, -1) for tags in side for tag in tags] for side in (gold, predicted))
        scores = classification_scores(gold_ids, predicted_ids, len(ids))
        del scores["mcc"]
        return scores

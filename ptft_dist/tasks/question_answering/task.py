"""Extractive question answering: the answer is a span of the context (Rajpurkar et al. 2016 and 2018, SQuAD)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForQuestionAnswering

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.labelled_text import LabelledTextTask
from ptft_dist.tasks.common.scores.spans import span_scores
from ptft_dist.tasks.protocol import IGNORE, Batch, LossOut, TaskSetup


class QuestionAnswering(LabelledTextTask):
    """Windows of token ids in; the mean of the cross-entropies of the answer's two ends, summed over windows, out.

    A window without the answer has the [CLS] token for both ends (the first token, if the tokenizer has no [CLS]).
    Tokens that pad a row cannot be chosen, or the loss would depend on how far it is padded.
    """

    auto_class = AutoModelForQuestionAnswering
    texts = 2

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.cls_id, self.may_decline = self.tokenizer.cls_token_id, setup.survey["unanswerable"] > 0
        if self.settings.no_answer_margin and not self.may_decline:
            raise RecipeError(
                "question_answering.no_answer_margin has no effect here: every training row has an answer, so an "
                "answer is always predicted"
            )

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:  # noqa: ARG003
        return {"num_labels": 2}  # the score of a beginning, and that of an end

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """targets_start, targets_end: positions [B]; context: where it begins and ends [B, 2]; nowhere: the position
        that stands for no answer [B]. The count is the number of windows."""
        columns = {name: np.stack([row.columns[name] for row in rows]) for name in ("context", "start", "end")}
        inputs = {
            **self.text_inputs(rows),
            "context": torch.from_numpy(columns["context"]),
            "nowhere": torch.tensor([self.nowhere(row.input_ids) for row in rows]),
            "targets_start": torch.from_numpy(columns["start"][:, 0]),
            "targets_end": torch.from_numpy(columns["end"][:, 0]),
        }
        return Batch(inputs, len(rows), sum(len(row.input_ids) for row in rows))

    def nowhere(self, ids: np.ndarray) -> int:
        return int(np.argmax(ids == self.cls_id))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return self.scored(inputs, *self.end_logits(model, inputs))

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        start, end = self.end_logits(model, inputs)
        return self.scored(inputs, start, end)._replace(predictions=self.best_spans(inputs, start, end))

    def end_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of beginnings and of ends, fp32 [B, T], -inf where a row is padded."""
        padding = inputs["attention_mask"] == 0
        start, end = (x.masked_fill(padding, -torch.inf) for x in self.probed(model, inputs).unbind(-1))
        return start, end

    def probed(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """fp32 [B, T, 2]: of beginnings and of ends, before padding is left out."""
        read = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in inputs}
        output = model(**read)
        return torch.stack([output.start_logits, output.end_logits], -1).float()

    @staticmethod
    def scored(inputs: dict[str, torch.Tensor], start: torch.Tensor, end: torch.Tensor) -> LossOut:
        """The metric `accuracy`: windows with both ends right."""
        starts, ends = inputs["targets_start"], inputs["targets_end"]
        loss_sum = sum(
            F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / 2
            for logits, targets in ((start, starts), (end, ends))
        )
        assert isinstance(loss_sum, torch.Tensor)
        there = starts != IGNORE
        right = (start.argmax(-1) == starts) & (end.argmax(-1) == ends) & there
        return LossOut(loss_sum, {"accuracy": (right.sum(), there.sum())})

    def best_spans(self, inputs: dict[str, torch.Tensor], start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """fp32 [B, 4]: the best span of the context, its first and last token and its score (-inf: there is none); and
        the score of no answer. Made of the n_best beginnings and ends, and not longer than max_answer_length."""
        places = torch.arange(start.shape[1], device=start.device)
        context = inputs["context"]
        outside = (places < context[:, :1]) | (places >= context[:, 1:])
        k = min(self.settings.n_best, start.shape[1])
        start_scores, firsts = start.masked_fill(outside, -torch.inf).topk(k)
        end_scores, lasts = end.masked_fill(outside, -torch.inf).topk(k)
        lengths = lasts[:, None, :] - firsts[:, :, None] + 1
        scores = start_scores[:, :, None] + end_scores[:, None, :]
        scores = scores.masked_fill((lengths < 1) | (lengths > self.settings.max_answer_length), -torch.inf)
        best, place = scores.flatten(1).max(1)
        first, last = firsts.gather(1, place[:, None] // k)[:, 0], lasts.gather(1, place[:, None] % k)[:, 0]
        nowhere = inputs["nowhere"][:, None]
        none = (start.gather(1, nowhere) + end.gather(1, nowhere))[:, 0]
        return torch.stack([first.float(), last.float(), best, none], 1)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Over questions: of each, the best span of all its windows; or no answer, whose score is the lowest of them,
        for one window that knows the answer is enough."""
        best: dict[int, tuple[float, str]] = {}
        declined: dict[int, float] = {}
        answers: dict[int, list[str]] = {}
        for number, (first, last, score, none) in predictions.items():
            window = row(number)
            meta = window.meta
            question = meta["question"]
            answers[question] = meta["answers"]
            declined[question] = min(none, declined.get(question, np.inf))
            found = best.setdefault(question, (-np.inf, ""))
            if score > found[0]:
                begins = int(window.columns["context"][0])
                begin, end = meta["offsets"][int(first) - begins][0], meta["offsets"][int(last) - begins][1]
                best[question] = score, meta["text"][begin:end].strip()
        margin = self.settings.no_answer_margin
        texts = [
            "" if self.may_decline and declined[question] - score > margin else text
            for question, (score, text) in best.items()
        ]
        return span_scores(texts, list(answers.values())), []

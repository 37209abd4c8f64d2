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
from ptft_dist.tasks.common.losses import row_losses
from ptft_dist.tasks.common.scores.spans import answer_scores, span_scores
from ptft_dist.tasks.protocol import IGNORE, Batch, Judged, LossOut, TaskSetup


class QuestionAnswering(LabelledTextTask):
    """Windows of token ids -> the mean of the cross-entropies of the answer's start and end, summed over windows.

    In a window without the complete answer, start and end are the [CLS] token (the first token if the tokenizer has no
    [CLS]). Padding gets the logit -inf, so that the loss does not depend on it.
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
        return {"num_labels": 2}  # start logit and end logit

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad windows and add positions; the count is the number of windows.

        targets_start and targets_end [B]: the answer's first and last token. context [B, 2]: [start, end) of the
        context. nowhere [B]: the position that means "no answer".
        """
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
        """The position that means "no answer": [CLS], else 0."""
        return int(np.argmax(ids == self.cls_id))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return self.scored(inputs, *self.end_logits(model, inputs))

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        start, end = self.end_logits(model, inputs)
        targets = inputs["targets_start"], inputs["targets_end"]
        losses = sum(
            F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none") / 2
            for logits, target in zip((start, end), targets, strict=True)
        )
        assert isinstance(losses, torch.Tensor)
        rows = row_losses(losses[:, None], targets[0][:, None])
        return self.scored(inputs, start, end)._replace(
            predictions=self.best_spans(inputs, start, end), row_losses=rows
        )

    def end_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Start logits and end logits, both fp32 [B, T], -inf for padding."""
        padding = inputs["attention_mask"] == 0
        start, end = (x.masked_fill(padding, -torch.inf) for x in self.probed(model, inputs).unbind(-1))
        return start, end

    def probed(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Start logits and end logits, without masking of padding: fp32 [B, T, 2]."""
        arguments = {k: inputs[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in inputs}
        output = model(**arguments)
        return torch.stack([output.start_logits, output.end_logits], -1).float()

    @staticmethod
    def scored(inputs: dict[str, torch.Tensor], start: torch.Tensor, end: torch.Tensor) -> LossOut:
        """The summed loss from the logits. The metric `accuracy` counts windows whose start and end are correct."""
        starts, ends = inputs["targets_start"], inputs["targets_end"]
        loss_sum = sum(
            F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum") / 2
            for logits, targets in ((start, starts), (end, ends))
        )
        assert isinstance(loss_sum, torch.Tensor)
        mask = starts != IGNORE
        correct = (start.argmax(-1) == starts) & (end.argmax(-1) == ends) & mask
        return LossOut(loss_sum, {"accuracy": (correct.sum(), mask.sum())})

    def best_spans(self, inputs: dict[str, torch.Tensor], start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """The best span of each window: first token, last token, score, and the score of no answer: fp32 [B, 4].

        Candidates combine the n_best starts and ends within the context, up to max_answer_length tokens. The score is
        -inf if there is no candidate.
        """
        positions = torch.arange(start.shape[1], device=start.device)
        context = inputs["context"]
        outside = (positions < context[:, :1]) | (positions >= context[:, 1:])
        k = min(self.settings.n_best, start.shape[1])
        start_scores, firsts = start.masked_fill(outside, -torch.inf).topk(k)
        end_scores, lasts = end.masked_fill(outside, -torch.inf).topk(k)
        lengths = lasts[:, None, :] - firsts[:, :, None] + 1
        scores = start_scores[:, :, None] + end_scores[:, None, :]
        scores = scores.masked_fill((lengths < 1) | (lengths > self.settings.max_answer_length), -torch.inf)
        best, index = scores.flatten(1).max(1)
        first, last = firsts.gather(1, index[:, None] // k)[:, 0], lasts.gather(1, index[:, None] % k)[:, 0]
        nowhere = inputs["nowhere"][:, None]
        no_answer = (start.gather(1, nowhere) + end.gather(1, nowhere))[:, 0]
        return torch.stack([first.float(), last.float(), best, no_answer], 1)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Exact match and F1 over questions."""
        windows: dict[int, list[tuple[Any, Row]]] = {}
        for number, prediction in predictions.items():
            window = row(number)
            windows.setdefault(window.meta["question"], []).append((prediction, window))
        texts = [self.answer(*zip(*each, strict=True))["text"] for each in windows.values()]
        return span_scores(texts, [each[0][1].meta["answers"] for each in windows.values()]), []

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:
        """The best span of all windows of a question: its text and [start, end) in the context, in characters.

        The text is empty, and start and end are null, if there is no answer. The score of no answer is the minimum over
        the windows, because most windows do not contain the answer.
        """
        no_answer = min(prediction[3] for prediction in predictions)
        best = max(range(len(rows)), key=lambda i: predictions[i][2])
        first, last, score, _ = predictions[best]
        declined = self.may_decline and no_answer - score > self.settings.no_answer_margin
        if declined or score == -np.inf:
            return {"text": "", "start": None, "end": None, "score": _finite(score), "no_answer_score": no_answer}
        meta, context_start = rows[best].meta, int(rows[best].columns["context"][0])
        start = meta["offsets"][int(first) - context_start][0]
        end = meta["offsets"][int(last) - context_start][1]
        found = meta["context"][start:end]
        text = found.strip()
        begin = meta.get("begin", 0) + start + len(found) - len(found.lstrip())
        return {
            "text": text,
            "start": begin,
            "end": begin + len(text),
            "score": score,
            "no_answer_score": no_answer,
        }

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        answers = rows[0].meta["answers"]
        exact, f1 = answer_scores(answer["text"], answers)
        return Judged(answer, answers, {"exact_match": (exact, 1), "f1": (f1, 1)})

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Exact match and F1 of questions with and without an answer."""
        kinds = {"with an answer": [each for each in judged if each.reference]}
        kinds["without an answer"] = [each for each in judged if not each.reference]
        return {
            "questions": [
                {"kind": kind, **span_scores([e.answer["text"] for e in part], [e.reference for e in part])}
                | {"questions": len(part)}
                for kind, part in kinds.items()
                if part
            ]
        }


def _finite(score: float) -> float | None:
    return score if np.isfinite(score) else None

"""Zero-shot and few-shot prompting of a causal network: the most likely label, or a generated text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from ptft_dist.data.encoder import LeftOut, RowError
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import text_only_backend
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.causal import NextTokenTask
from ptft_dist.tasks.common.generation import (
    PROMPT,
    check_room,
    check_room_left,
    end_ids,
    generate_answers,
    generated_text,
    judged_text,
    left_padded,
    scores_of_texts,
)
from ptft_dist.tasks.common.label_answers import judged_label, label_answer, label_tables
from ptft_dist.tasks.common.padding import pad
from ptft_dist.tasks.common.scores.labels import classification_scores
from ptft_dist.tasks.prompting.prompts import Prompts
from ptft_dist.tasks.protocol import IGNORE, Batch, Judged, LossOut, TaskSetup


class Prompting(NextTokenTask):
    """Log-likelihoods of the labels after a prompt, or a text that continues it. There is no training."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.labels = list(self.settings.labels or ())
        if not self.labels:
            check_room_left(setup, network)
        self.free_row = None if self.settings.calibrate is None else self._free_row(self.settings.calibrate)
        self.free: torch.Tensor | None = None  # fp32 [labels]: log-likelihoods after the content-free prompt
        self.eos_ids = end_ids(setup, network)
        if not self.labels and not self.eos_ids:
            raise RecipeError("tokenizer: it has no EOS token, so a generated text never ends. Use a model with one")
        # Pad generated texts with a special token, because decoding with skip_special_tokens removes only these.
        self.fill_id = self.pad_id if self.tokenizer.pad_token_id is not None or self.labels else self.eos_ids[0]

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Raises RecipeError if free generation needs more positions than the network has."""
        if setup.settings.labels is None:
            check_room(setup, config)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad the S sequences of B rows with K answers each on the right: input_ids [S, T].

        `answers` [5, N] has for each of the N tokens of answers its sequence, its position, the index of this position
        in `keep`, the positions whose logits are needed, its id, and its owner: row x K + answer. `divisors` [B, K] are
        for the normalization; `targets` [B] are the labels.
        """
        sequences: list[np.ndarray] = []
        tokens: list[np.ndarray] = []  # [4, n]: sequence, position, id, owner
        for number, row in enumerate(rows):
            columns = row.columns
            first, answers = len(sequences), len(columns["answer_lengths"])
            sequences += np.split(row.input_ids, np.cumsum(columns["lengths"])[:-1])
            lengths = columns["answer_lengths"]
            inside = np.concatenate([np.arange(n) for n in lengths])
            owners = np.repeat(np.arange(answers), lengths)
            places = int(columns["prompt"][0]) - 1 + inside
            tokens.append(
                np.stack([first + columns["sequences"][owners], places, columns["answers"], number * answers + owners])
            )
        sequence, place, ids, owner = np.concatenate(tokens, axis=1)
        keep, column = np.unique(place, return_inverse=True)
        inputs = {
            "input_ids": pad(sequences, self.pad_id, self.pad_multiple),
            "keep": torch.from_numpy(keep),
            "answers": torch.from_numpy(np.stack([sequence, place, column, ids, owner])),
            "divisors": torch.from_numpy(np.stack([self._divisors(row) for row in rows])),
            "targets": torch.tensor([int(row.columns["label"][0]) for row in rows]),
        }
        if not self.labels:
            prompts = left_padded(
                [row.input_ids[: int(row.columns["prompt"][0])] for row in rows], self.pad_id, self.pad_multiple
            )
            inputs |= {PROMPT + name: x for name, x in prompts.items()}
        return Batch(inputs, len(rows) if self.labels else len(ids), sum(len(each) for each in sequences))

    def _divisors(self, row: Row) -> np.ndarray:
        """What the log-likelihoods of the answers are divided by: fp32 [K]."""
        if self.settings.normalize == "none":
            return np.ones(len(row.columns["bytes"]), np.float32)
        name = "answer_lengths" if self.settings.normalize == "tokens" else "bytes"
        return row.columns[name].astype(np.float32)

    def log_likelihoods(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The summed log-probabilities of the tokens of each answer: fp32 [B, K]."""
        sequence, place, column, ids, owner = inputs["answers"]
        kept: dict[str, Any] = {"logits_to_keep": inputs["keep"]} if self.takes_positions else {}
        logits = model(input_ids=inputs["input_ids"], use_cache=False, **kept).logits
        chosen = logits[sequence, column if kept else place].float()
        logprobs = -F.cross_entropy(chosen, ids, reduction="none")
        divisors = inputs["divisors"]
        return logprobs.new_zeros(divisors.numel()).index_add_(0, owner, logprobs).view(divisors.shape)

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The loss; predictions are the log-likelihoods of the labels, and their scores: fp32 [B, 2, K].

        A score is the log-likelihood, less that after the content-free prompt, divided by the number of tokens or
        bytes. The loss is the cross-entropy of the scores. In free generation the loss is that of the reference's
        tokens, and predictions are generated ids [B, max_new_tokens].
        """
        found, targets = self.log_likelihoods(model, inputs), inputs["targets"]
        mask = (targets != IGNORE).float()
        if not self.labels:
            owner = inputs["answers"][4]
            counts = torch.zeros_like(mask).index_add_(0, owner, torch.ones_like(owner, dtype=mask.dtype))
            losses, predictions = -found[:, 0] * mask, self._generated(model, inputs)
        else:
            scores = (found - self._content_free(model, found.device)) / inputs["divisors"]
            losses = F.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="none")
            predictions, counts = torch.stack([found, scores], 1), torch.ones_like(mask)
        return LossOut(losses.sum(), {}, predictions, torch.stack([losses, counts * mask], 1))

    def predict(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().predict(model, inputs) if self.labels else self._generated(model, inputs)

    def _generated(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return generate_answers(self, model, inputs)

    def _content_free(self, model: torch.nn.Module, device: torch.device) -> torch.Tensor | float:
        """The log-likelihoods of the labels after the content-free prompt: fp32 [labels]; 0 without calibration.

        Computed in the first call, which every rank makes.
        """
        if self.free_row is None:
            return 0.0
        if self.free is None:
            inputs = {name: x.to(device) for name, x in self.collate([self.free_row]).inputs.items()}
            self.free = self.log_likelihoods(model, inputs)[0]
        return self.free

    def _free_row(self, text: str) -> Row:
        """The content-free prompt, encoded as the rows are. Raises RecipeError if it does not fit data.max_length."""
        prompt = self.settings.template.format_map(dict.fromkeys(self.settings.columns, text))
        prompts = Prompts(self.settings, self.tokenizer, self.setup.survey["shots"])
        backend = text_only_backend(self.tokenizer)
        backend.encode_special_tokens = not self.settings.chat
        answers = list(self.settings.labels.values())
        pieces = [backend.encode(piece, add_special_tokens=False).ids for piece in prompts.pieces(prompt, answers)]
        try:
            columns = prompts.columns(pieces, answers, self.setup.max_length) | {"label": [0]}
        except (RowError, LeftOut) as why:
            raise RecipeError(f"prompting.calibrate: the prompt with {text!r}: {why}. Use another text") from None
        arrays = {name: np.array(values, np.int64) for name, values in columns.items()}
        return Row(arrays.pop("input_ids"), np.zeros(1, np.int64), arrays)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """loss: of the labels; in free generation that of a reference's token in nats, with its perplexity."""
        return {"loss": totals["loss"]} if self.labels else super().eval_metrics(totals)

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        if not self.labels:
            texts = {number: self._text(ids) for number, ids in predictions.items()}
            return scores_of_texts(texts, self.settings.generation, row)
        gold = [int(row(number).columns["label"][0]) for number in predictions]
        chosen = [int(np.argmax(scores)) for _, scores in predictions.values()]
        return classification_scores(gold, chosen, len(self.labels)), []

    def _text(self, ids: Sequence[int]) -> str:
        """A generated text up to the separator of examples, without white space at its ends."""
        text = generated_text(self.tokenizer, ids).strip()
        return text if self.settings.chat else text.split(self.settings.separator)[0].strip()

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:  # noqa: ARG002
        """The most likely label with the probabilities and log-likelihoods of all; or the text."""
        if not self.labels:
            return {"text": self._text(predictions[0])}
        found, scores = predictions[0]
        return {**label_answer(scores, self.labels), "log_likelihoods": dict(zip(self.labels, found, strict=True))}

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        if not self.labels:
            return judged_text(answer, rows[0], self.settings.generation)
        return judged_label(answer, rows[0].meta["label"])

    def target_ids(self, row: Row) -> np.ndarray | None:  # type: ignore[override]
        return None if self.labels else row.columns["answers"]

    def before_targets(self, row: Row) -> np.ndarray:
        prompt = int(row.columns["prompt"][0])
        return row.input_ids[prompt - 1 : prompt]

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:
        return label_tables(judged, self.labels) if self.labels else {}

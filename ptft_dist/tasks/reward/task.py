"""Reward modelling: a network with a scalar head learns to score the chosen text of a pair above the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.dropout import turn_off_dropout
from ptft_dist.tasks.common.labelled_text import LabelledTextTask
from ptft_dist.tasks.common.last_token import padding_token
from ptft_dist.tasks.common.preference_rows import halves
from ptft_dist.tasks.common.scores.preferences import preference_scores
from ptft_dist.tasks.protocol import Batch, Judged, LossOut, TaskSetup

MARGIN = "targets_margin"
"""Name of the batch input with the margins: fp32 [B], 0 without one, NaN in a dummy batch."""


class RewardModelling(LabelledTextTask):
    """Pairs of texts -> summed negative log-likelihood of the preferences (Bradley-Terry)."""

    ends_by_mask = True

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        pad_id = padding_token(setup.tokenizer, setup.survey.get("last_tokens", ()))
        if pad_id is None:
            raise RecipeError(
                "tokenizer: its special tokens end the texts, and transformers needs another one for padding, to find "
                'the end of a text. Add one: tokenizer.add: ["<|pad|>"]'
            )
        if pad_id != setup.tokenizer.pad_token_id:
            setup.tokenizer.pad_token = setup.tokenizer.convert_ids_to_tokens(pad_id)
        super().__init__(setup, network, device)

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:  # noqa: ARG003
        return {"num_labels": 1, "problem_type": "regression"}

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Raises RecipeError for an encoder-decoder, and for a network that reads padding."""
        if config.is_encoder_decoder:
            raise RecipeError(
                f"model: {config.model_type} is an encoder-decoder. A reward model needs a decoder, such as Llama, or "
                "an encoder, such as BERT"
            )
        super().fit_config(setup, config)

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Read decoders at the last token, turn dropout off, and note in the config how rows become texts.

        `ptft score` reads this from task_specific_params.
        """
        super().prepare_network(model)
        if not self.settings.dropout:
            turn_off_dropout(model)
        others = getattr(model.config, "task_specific_params", None) or {}
        rows = {"shape": self.settings.shape, "system": self.settings.system}
        model.config.task_specific_params = {**others, "ptft": rows}

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad the chosen and then the rejected texts, [2B, T], and add the margins [B]. The count is B."""
        pairs = [halves(row.input_ids, row.columns["parts"]) for row in rows]
        texts = [_text(ids) for ids in (*(pair[0] for pair in pairs), *(pair[1] for pair in pairs))]
        margins = np.nan_to_num(np.array([row.columns["margin"][0] for row in rows], np.float32))
        inputs = {**self.text_inputs(texts), MARGIN: torch.from_numpy(margins)}
        return Batch(inputs, len(rows), sum(len(row.input_ids) for row in rows))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """-log sigmoid(chosen - rejected - margin), plus the centring term; as TRL's RewardTrainer.

        Ouyang et al. 2022, equation 1, with the margin of Touvron et al. 2023, equation 2.
        """
        rewards = self.logits(model, inputs)[:, 0]  # [2B]
        chosen, rejected = rewards.chunk(2)
        mask, margins = ~inputs[MARGIN].isnan(), inputs[MARGIN].nan_to_num()
        losses = -F.logsigmoid(chosen - rejected - margins)
        if coefficient := self.settings.center_rewards_coefficient:
            losses = losses + coefficient * (chosen + rejected) ** 2
        pairs = mask.sum()
        metrics = {
            "accuracy": (((chosen > rejected) & mask).sum(), pairs),
            "margin": (((chosen - rejected).detach() * mask).sum(), pairs),
            "reward": (((chosen + rejected).detach() * mask).sum(), 2 * pairs),
        }
        rows = torch.stack([losses.detach() * mask, mask.float()], 1)
        return LossOut((losses * mask).sum(), metrics, torch.stack([chosen, rejected], 1).detach(), rows)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores over all validation pairs. predictions: row number -> rewards of the chosen and the rejected text."""
        lengths = np.array([row(number).columns["parts"][1:] for number in predictions])
        return preference_scores(np.array(list(predictions.values())), lengths), []

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:  # noqa: ARG002
        chosen, rejected = predictions[0]
        return {"score_chosen": chosen, "score_rejected": rejected}

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:  # noqa: ARG002
        """The reference is that the chosen text is better."""
        margin = answer["score_chosen"] - answer["score_rejected"]
        return Judged(answer, "chosen", {"accuracy": (margin > 0, 1), "margin": (margin, 1)})


def _text(ids: np.ndarray) -> Row:
    return Row(ids, np.zeros(1, np.int64), {"token_type_ids": np.zeros(len(ids), np.int64)})

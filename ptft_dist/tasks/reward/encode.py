"""Encodes preference rows for reward modelling."""

from __future__ import annotations

from ptft_dist.data.encoder import EncoderContext, Example
from ptft_dist.tasks.common.preference_rows import PreferenceRows, halves


class RewardRows(PreferenceRows):
    """Encodes pairs; see PreferenceRows. The survey has `last_tokens`: the special tokens that end training texts."""

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        self.survey |= {"last_tokens": []}

    def count(self, example: Example) -> None:
        seen = self.survey["last_tokens"]
        for ids in halves(example.columns["input_ids"], example.columns["parts"]):
            if (last := int(ids[-1])) in self.control.names and last not in seen:
                seen.append(last)

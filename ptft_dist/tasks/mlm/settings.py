"""Settings of masked language modelling."""

from __future__ import annotations

from ptft_dist.tasks.common.masking_settings import Masking


class MlmSettings(Masking):
    """Settings of masked language modelling. A document is [CLS] text [SEP]."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity", "accuracy"

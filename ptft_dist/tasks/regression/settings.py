"""Settings of regression."""

from __future__ import annotations

from typing import Literal

from ptft_dist.tasks.common.labelled_text_settings import LabelledText


class RegressionSettings(LabelledText):
    """Settings of predicting a number from a text or a pair of texts. Longer texts are truncated and counted."""

    after_prepare = ("loss",)

    loss: Literal["mse", "mae", "huber"] = "mse"
    """Mean squared error, mean absolute error, or Huber loss."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "pearson", "spearman", "mse", "mae"

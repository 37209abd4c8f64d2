"""Settings shared by classification and regression."""

from __future__ import annotations

from ptft_dist.config.task_settings import TaskSettings


class LabelledText(TaskSettings):
    """Settings of tasks that predict something from a text or a pair of texts."""

    pair: bool = False
    """Each row has a second text, `text_pair`."""

    text_settings = ("pair", "entities")

    @property
    def roles(self) -> tuple[str, ...]:
        return ("text", "text_pair", "label") if self.pair else ("text", "label")

    @property
    def text_roles(self) -> tuple[str, ...]:
        return ("text", "text_pair") if self.pair else ("text",)

    @property
    def augmentable(self) -> bool:
        return True

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"

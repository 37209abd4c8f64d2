"""Settings shared by tasks on preference pairs."""

from __future__ import annotations

from typing import Literal

from ptft_dist.tasks.common.chat_settings import ChatSettings


class PreferenceSettings(ChatSettings):
    """Settings of tasks whose rows are pairs: a prompt, the chosen answer and the rejected answer."""

    texts_per_row = 2

    shape: Literal["auto", "preference", "single_turn", "hh", "sharegpt"] = "auto"
    """The format of the rows. `preference`: TRL's chosen and rejected, with or without prompt, as texts or as lists of
    messages (role and content); texts are joined without a chat template. `single_turn`: three texts, where prompt is
    the user's message, and chosen and rejected are the assistant's. `hh`: two transcripts of "\\n\\nHuman: ..." and
    "\\n\\nAssistant: ...". `sharegpt`: conversations, chosen and rejected as turns with from and value. `auto`: from
    each file's first row, whose shape all its rows must share; it never chooses `single_turn`."""
    too_long: Literal["drop", "cut"] = "drop"
    """Pairs with a text longer than data.max_length are dropped, as TRL's reward trainer does, or truncated at the end
    (`cut`), as its DPO does. Both are counted. A pair whose prompt fills data.max_length is always dropped."""

    @property
    def linked_texts(self) -> str | None:
        return "chosen and rejected begin with the same prompt"

    @property
    def roles(self) -> tuple[str, ...]:
        return "prompt", "chosen", "rejected", "margin", "conversations", "system", "tools"

    @property
    def text_roles(self) -> tuple[str, ...]:
        return "prompt", "chosen", "rejected", "conversations", "system"

"""Settings shared by tasks on conversations."""

from __future__ import annotations

from typing import ClassVar

from ptft_dist.config.section import Text
from ptft_dist.config.task_settings import TaskSettings

CHATML = ("<|im_start|>", "<|im_end|>")


class ChatSettings(TaskSettings):
    """Settings of tasks whose rows are conversations."""

    section: ClassVar[str]
    """The name of the task's section in the recipe, for messages."""
    text_settings = ("shape", "system")

    template: Text | None = None
    """The chat template: a name that TRL knows (chatml, llama3, qwen3, ...), or a Jinja file. Default: the tokenizer's
    own, and `chatml` for a tokenizer that is trained here."""
    system: Text | None = None
    """A system message for conversations without one."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return f"eos={CHATML[1]}", "bos", "pad"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        return CHATML[:1]

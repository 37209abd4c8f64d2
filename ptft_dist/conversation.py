"""A conversation with a trained model, for `ptft chat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from ptft_dist.errors import RecipeError
from ptft_dist.generation import continued, libraries_restored, load_network, sampling_options


class Conversation:
    """Messages of a user and the answers of a model, which reads all of them for each answer.

    Attributes:
        messages: those so far, with `role` and `content`.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        system: str | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        adapters: Mapping[str, Path],
        use: str | None,
    ) -> None:
        """Load the model; see `api.chat`."""
        with libraries_restored():
            self._model, self._tokenizer = load_network(model_dir, adapters, use)
            self._model.to(torch.accelerator.current_accelerator() or torch.device("cpu"))
        config = self._model.config
        if config.is_encoder_decoder or not self._tokenizer.chat_template:
            what = "is an encoder-decoder" if config.is_encoder_decoder else "has no chat template"
            raise RecipeError(f"{model_dir}: the model {what}, so it cannot chat. For one text: ptft generate")
        self._positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._options = sampling_options(self._tokenizer, max_new_tokens, temperature, top_p)
        self._system, self._seed = system, seed
        self.messages: list[dict[str, str]] = []
        self.restart()

    def restart(self) -> None:
        """Forget all messages but the system's."""
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []

    def answer(self, message: str, show: Callable[[str], None] | None = None) -> str:
        """Add a message and the model's answer, which is returned. After an error or Ctrl-C, neither is added.

        Args:
            show: called with each new part of the answer.

        Raises:
            RecipeError: the template refuses the messages, or they have more tokens than the model has positions.
        """
        asked = [*self.messages, {"role": "user", "content": message}]
        ids = self._encoded(asked).to(self._model.device)
        new = self._options["max_new_tokens"]
        if isinstance(self._positions, int) and ids.shape[1] + new > self._positions:
            raise RecipeError(
                f"the conversation has {ids.shape[1]:,} tokens, and its answer up to {new:,}: "
                f"more than the model's max_position_embeddings, {self._positions:,}. Begin another conversation"
            )
        streamer = _Shower(self._tokenizer, show) if show is not None else None
        with libraries_restored():
            torch.manual_seed(self._seed + len(self.messages))
            output = continued(self._model, ids, streamer=streamer, **self._options)
        text = str(self._tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)).strip()
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text

    def _encoded(self, messages: list[dict[str, str]]) -> Tensor:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of their own
            raise RecipeError(f"the chat template refuses these messages: {error}") from None
        return cast(Tensor, self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)


class _Shower(TextStreamer):
    """Passes an answer on while it is generated, at the ends of words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        decoding: dict[str, Any] = {"skip_special_tokens": True}
        super().__init__(tokenizer, skip_prompt=True, **decoding)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        if text:
            self._show(text)

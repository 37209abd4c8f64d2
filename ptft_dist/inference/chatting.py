"""Chat with a trained model, for `ptft chat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from ptft_dist.errors import RecipeError
from ptft_dist.inference.generation import Sampling, available_device, continue_prompt, libraries_restored, load_network


class Chat:
    """A chat with a model, which gets the whole chat in its prompt for each answer.

    Attributes:
        messages: the messages so far, with `role` and `content`.
    """

    def __init__(
        self, model_dir: Path, sampling: Sampling, *, system: str | None, adapters: Mapping[str, Path], use: str | None
    ) -> None:
        """Load the model; see `api.chat`."""
        with libraries_restored():
            self._model, self._tokenizer = load_network(model_dir, adapters, use)
            self._model.to(available_device())
        config = self._model.config
        if config.is_encoder_decoder or not self._tokenizer.chat_template:
            what = "is an encoder-decoder" if config.is_encoder_decoder else "has no chat template"
            raise RecipeError(f"{model_dir}: the model {what}, so it cannot chat. Use ptft generate")
        self._positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._sampling, self._system = sampling, system
        self.messages: list[dict[str, str]] = []
        self.restart()

    def restart(self) -> None:
        """Remove all messages except the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []

    def answer(self, message: str, show: Callable[[str], None] | None = None) -> str:
        """Generate the answer to a message, and add both to the chat. An error or Ctrl-C leaves the chat unchanged.

        Args:
            show: called with each new part of the answer, a word or more.

        Raises:
            RecipeError: the chat template rejects the messages, or they have more tokens than the model has positions.
        """
        asked = [*self.messages, {"role": "user", "content": message}]
        ids = self._encode(asked).to(self._model.device)
        new = self._sampling.max_new_tokens
        if isinstance(self._positions, int) and ids.shape[1] + new > self._positions:
            raise RecipeError(
                f"the chat has {ids.shape[1]:,} tokens, and its answer up to {new:,}: more than the model's "
                f"max_position_embeddings, {self._positions:,}. Start a new chat, or lower max_new_tokens"
            )
        streamer = _Streamer(self._tokenizer, show) if show is not None else None
        with libraries_restored():
            torch.manual_seed(self._sampling.seed + len(self.messages))
            output = continue_prompt(self._model, self._tokenizer, ids, self._sampling, streamer, chat=True)
        text = str(self._tokenizer.decode(output[ids.shape[1] :], skip_special_tokens=True)).strip()
        self.messages = [*asked, {"role": "assistant", "content": text}]
        return text

    def _encode(self, messages: Sequence[dict[str, str]]) -> Tensor:
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:  # what templates raise
            raise RecipeError(f"the chat template rejects these messages: {error}") from None
        return cast(Tensor, self._tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)


class _Streamer(TextStreamer):
    """Passes the text of an answer on while it is generated, up to the last white space or Chinese character.

    The text is decoded from all tokens. TextStreamer begins again after each line, and decoders of SentencePiece remove
    the first space of what they decode, so indented lines would be shown with one space less.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        decoding: dict[str, Any] = {"skip_special_tokens": True}
        super().__init__(tokenizer, skip_prompt=True, **decoding)
        self._show = show

    def put(self, value: Tensor) -> None:
        """value: the prompt [1, T], then each new token [1]."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache += value.reshape(-1).tolist()
        new = str(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))[self.print_len :]
        ends = [i for i, each in enumerate(new, 1) if each.isspace() or self._is_chinese_char(ord(each))]
        self.print_len += ends[-1] if ends else 0
        self.on_finalized_text(new[: ends[-1] if ends else 0])

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        if text:
            self._show(text)

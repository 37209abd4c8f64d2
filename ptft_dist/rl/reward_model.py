"""Reward models: frozen networks that score a prompt with its response."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ptft_dist.data.tokenizer import after_answer, load_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt.switching import read_scorer
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.networks.names import adapter_base, is_adapter
from ptft_dist.rl.rollout import Trajectory

Ask = Callable[[Callable[..., Any], dict[str, torch.Tensor]], Any]
"""(call, inputs) -> call(network, inputs) of the trained network, such as Engine.forward."""


def check_reward_model(key: str, path: str, config: PretrainedConfig, longest: int) -> None:
    """Check the config of a reward model.

    longest: the most tokens of a prompt with its response.

    Raises:
        RecipeError: it has another number of labels than 1, or too few positions.
    """
    if config.num_labels != 1:
        architecture = ", ".join(config.architectures or ["network"])
        raise RecipeError(
            f"{key}: {path} ({architecture}) has {config.num_labels} labels; a reward model has one. Train one with "
            "task: reward"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < longest:
        raise RecipeError(
            f"{key}: {path} has {positions} positions, and a prompt with its response has up to {longest} tokens: "
            "lower data.max_length or sampling.max_new_tokens, or use another reward model"
        )


def tokenizer_of(source: FrozenSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model; that of the base for an adapter without one. Raises RecipeError without any."""
    path, section = source.path, source.section
    revision, remote_code = section.revision, section.trust_remote_code
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path, revision = adapter_base(path)
    return load_tokenizer(path, revision=revision, trust_remote_code=remote_code, key=source.key)


class RewardModel:
    """A reward model: a network of its own, which is in `network` once the engine has placed it, or an adapter of the
    trained network."""

    network: Any
    positions: int | None = None
    """The most tokens of a text; None: no known limit."""

    def __init__(
        self,
        key: str,
        path: str,
        policy: PreTrainedTokenizerBase,
        own: PreTrainedTokenizerBase | None = None,
        *,
        shared: str | None = None,
    ) -> None:
        """Compare the tokenizers.

        Args:
            key: the recipe's key, for messages.
            policy: the policy's tokenizer.
            own: its own tokenizer; default: the one in `path`.
            shared: the name of the adapter in the trained network.
        """
        self.key, self.path, self.shared = key, path, shared
        own = load_tokenizer(path, key=key) if own is None else own
        self.tokenizer = None if own.get_vocab() == policy.get_vocab() else own
        """The reward model's tokenizer, if it differs from the policy's: texts are then tokenized again."""
        self.after_answer = after_answer(own)
        self.template_of = None if _write_alike(own, policy) else own
        """The reward model's tokenizer, if it writes conversations in another way."""
        pad = (self.tokenizer or policy).pad_token_id
        self.pad_id = 0 if pad is None else int(pad)

    def texts(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """The token ids of each prompt with its response, for this network.

        Raises:
            RecipeError: a text is longer than the network has positions for, or cannot be written for its tokenizer.
        """
        texts = [self._ids_of(each) for each in trajectories]
        longest = max(map(len, texts), default=0)
        if self.positions is not None and longest > self.positions:
            raise RecipeError(
                f"{self.key}: {self.path} has {self.positions} positions, and a prompt with its response has {longest} "
                "tokens of its tokenizer: lower data.max_length or sampling.max_new_tokens, or use another reward model"
            )
        return texts

    def _ids_of(self, each: Trajectory) -> np.ndarray:
        tokenizer = self.tokenizer
        if tokenizer is None and not isinstance(each.prompt.text, str):
            tokenizer = self.template_of
        if tokenizer is None:
            return np.concatenate([each.prompt.ids, each.response, self._rest_of_turn(each)])
        return self._tokenized_again(tokenizer, each)

    def _rest_of_turn(self, each: Trajectory) -> np.ndarray:
        """What the chat template writes after the end of turn with which a response ends, such as a newline. The reward
        model was trained on texts that have it, and is read there."""
        if isinstance(each.prompt.text, str) or each.response[-1] not in self.after_answer:
            return np.zeros(0, np.int64)
        return np.array(self.after_answer[self.after_answer.index(each.response[-1]) + 1 :], np.int64)

    def _tokenized_again(self, tokenizer: PreTrainedTokenizerBase, each: Trajectory) -> np.ndarray:
        if isinstance(each.prompt.text, str):
            ids = tokenizer(each.prompt.text + each.text)["input_ids"]
            eos = tokenizer.eos_token_id
            ids = ids + [eos] * (each.ended and eos is not None and ids[-1:] != [eos])
        else:
            if not tokenizer.chat_template:
                raise RecipeError(
                    f"{self.key}: {self.path} has another tokenizer than the policy, and no chat template, so a "
                    "conversation cannot be written for it. Give its tokenizer a chat template"
                )
            messages = [*each.prompt.text, {"role": "assistant", "content": each.text}]
            try:
                text = tokenizer.apply_chat_template(messages, tools=each.prompt.tools, tokenize=False)
            except (TemplateError, TypeError, ValueError) as error:  # what templates raise
                raise RecipeError(
                    f"{self.key}: the chat template of {self.path} refuses a conversation of this run: {error}. "
                    "Correct the template or the rows, or use a reward model with the tokenizer of the policy"
                ) from None
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            end = self.after_answer
            if not each.ended and end and ids[-len(end) :] == end:
                ids = ids[: -len(end)]
        return np.array(ids, np.int64)

    def padded(self, texts: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Texts padded on the right: input_ids and attention_mask, int64 [B, T]."""
        width = max(map(len, texts))
        ids, mask = np.full((len(texts), width), self.pad_id, np.int64), np.zeros((len(texts), width), np.int64)
        for i, text in enumerate(texts):
            ids[i, : len(text)], mask[i, : len(text)] = text, 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    def scores(self, policy: Ask, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scores of padded texts: fp32 [B]. All ranks must call it together.

        policy: calls the trained network.
        """
        scores: torch.Tensor
        if self.shared is not None:
            scores = policy(partial(read_scorer, name=self.shared), inputs)
        else:
            scores = self.network.forward(read_scores, inputs)
        return scores


def _write_alike(own: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase) -> bool:
    """Whether two chat templates write the same text, or the first tokenizer has none."""
    if not own.chat_template or own.chat_template == policy.chat_template:
        return True
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
    return all(_written(own, messages) == _written(policy, messages) for messages in (turns, turns[1:], turns[1:3]))


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str | None:
    """A conversation as a chat template writes it; None without a template, and if it refuses the conversation."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False)) if tokenizer.chat_template else None
    except (TemplateError, TypeError, ValueError):
        return None


def read_scores(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The scores of a reward model: fp32 [B], read at the last token of each row by the mask.

    transformers looks for the last token that is not the padding token, and so passes over an EOS that is one too.

    Args:
        model: a sequence classifier with one label.
        inputs: input_ids and attention_mask [B, T], padded on the right.
    """
    head = getattr(model, "score", None)
    if head is None:  # an encoder, whose classifier reads the first token
        logits: torch.Tensor = model(**inputs).logits
        return logits.float().squeeze(-1)
    hidden = getattr(model, model.base_model_prefix)(**inputs, use_cache=False).last_hidden_state
    last = inputs["attention_mask"].sum(1) - 1
    score: torch.Tensor = head(hidden[torch.arange(len(hidden), device=hidden.device), last])
    return score.float().squeeze(-1)

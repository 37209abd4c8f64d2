"""Text generation at evaluations, for tasks with a `generation` section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.generation_settings import GenerationSettings
from ptft_dist.tasks.common.scores.text import text_scores
from ptft_dist.tasks.protocol import Judged, TaskSetup

PROMPT = "prompt/"
"""Prefix of the batch inputs of prompts, at evaluations."""


def check_room(setup: TaskSetup, config: PretrainedConfig) -> None:
    """Raises RecipeError if a prompt and a generated text need more positions than a decoder has."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        described = f"the model's max_position_embeddings ({positions})"
        _check_positions(setup, positions, described, ", or raise max_position_embeddings")


def check_room_left(setup: TaskSetup, network: NetworkFacts) -> None:
    """As `check_room`, with the positions that virtual tokens leave. network: adapted facts."""
    if network.max_positions is not None:
        _check_positions(
            setup, network.max_positions, f"the {network.max_positions} positions of the model with its adapter"
        )


def _check_positions(setup: TaskSetup, positions: int, described: str, otherwise: str = "") -> None:
    if (longest := setup.max_length + setup.settings.generation.max_new_tokens) > positions:
        raise RecipeError(
            f"{setup.name}.generation.max_new_tokens: with data.max_length, prompt and generated text have up to "
            f"{longest} tokens, more than {described}: lower one of them{otherwise}"
        )


def end_ids(setup: TaskSetup, network: NetworkFacts) -> list[int]:
    """The tokens that end a text: EOS, the chat template's end of turn if it is another one, and the network's own."""
    own = [setup.tokenizer.eos_token_id, setup.survey.get("end_of_turn"), *network.eos_ids]
    return [i for i in dict.fromkeys(own) if i is not None]


def end_texts_with(model: PreTrainedModel, eos_ids: Sequence[int]) -> None:
    """Let the exported network end its texts with these tokens: `ptft generate`, pipelines and vLLM read them there."""
    config = model.generation_config
    if config is None:
        return
    before = config.eos_token_id
    if set(eos_ids) != set(before if isinstance(before, list) else [before]):
        config.eos_token_id = list(eos_ids) if len(eos_ids) > 1 else eos_ids[0]


def generate(
    model: Any,
    inputs: Mapping[str, torch.Tensor],
    settings: GenerationSettings,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> torch.Tensor:
    """Generate a text for each row by greedy decoding or beam search: token ids, int64 [B, max_new_tokens].

    The ids contain neither the prompt nor the decoder's start token, and are padded with `pad_id` after EOS. Other
    settings of the network's generation config (forced tokens, penalties, stop strings) apply. Every process must make
    the same number of calls: with sharded weights each decoding step needs all processes, so all of them continue until
    the last one has finished.

    Args:
        model: the unwrapped network, called within the engine's forward pass, in evaluation mode.
        inputs: input_ids and attention_mask [B, T]: the encoder's inputs; for a decoder, prompts padded on the left.
        tokenizer: for stop strings.
    """
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        num_return_sequences=1,
        do_sample=False,
        use_cache=True,  # model.config may disable it for training
        return_dict_in_generate=False,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids),
    )
    processors = LogitsProcessorList()
    if not model.config.is_encoder_decoder:
        processors.append(WithoutPadding(model.generation_config, inputs, eos_ids))
        config.update(**_OF_WHOLE_ROWS)
    together = dist.is_initialized() and dist.get_world_size() > 1
    ids: torch.Tensor = model.generate(
        **inputs,
        generation_config=config,
        logits_processor=processors,
        tokenizer=tokenizer,
        synced_gpus=together,
    )
    ids = ids[:, 1 if model.config.is_encoder_decoder else inputs["input_ids"].size(1) :]
    ends = torch.isin(ids, torch.tensor(eos_ids, device=ids.device)).long()
    ids = ids.masked_fill(ends.cumsum(1) > ends, pad_id)  # beam search pads shorter texts with EOS
    return F.pad(ids, (0, settings.max_new_tokens - ids.size(1)), value=pad_id)


def prompts_of(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a batch that belong to its prompts, without PROMPT in their names."""
    return {key.removeprefix(PROMPT): x for key, x in inputs.items() if key.startswith(PROMPT)}


class Generates(Protocol):
    """A task that generates texts after prompts at evaluations."""

    settings: Any
    tokenizer: PreTrainedTokenizerBase
    fill_id: int
    """Pads generated texts."""
    eos_ids: list[int]


def generate_answers(task: Generates, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A text after each prompt of a batch, as `task.settings.generation` says: see `generate`."""
    return generate(
        model,
        prompts_of(inputs),
        task.settings.generation,
        pad_id=task.fill_id,
        eos_ids=task.eos_ids,
        tokenizer=task.tokenizer,
    )


_OF_WHOLE_ROWS = {
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
}
"""Keys of a generation config that transformers applies to a decoder's prompt with its padding, and no effect."""


class WithoutPadding(LogitsProcessor):
    """Applies these keys of a decoder's own generation config to each row without the padding on its left.

    A text then does not depend on the other prompts of its batch.
    """

    def __init__(self, own: GenerationConfig, inputs: Mapping[str, torch.Tensor], eos_ids: Sequence[int]) -> None:
        """inputs: input_ids and attention_mask [B, P]."""
        wanted = {key: x for key, none in _OF_WHOLE_ROWS.items() if (x := getattr(own, key)) not in (None, none)}
        if own.min_new_tokens is not None:  # takes the place of min_length, and counts new tokens only
            wanted.pop("min_length", None)
        self.starts = (inputs["attention_mask"] != 0).int().argmax(1).tolist() if wanted else []
        self.rows = [
            self._processors(wanted, ids[None, start:], eos_ids)
            for ids, start in zip(inputs["input_ids"], self.starts, strict=False)
        ]

    @staticmethod
    def _processors(wanted: Mapping[str, Any], prompt: Any, eos_ids: Sequence[int]) -> LogitsProcessorList:
        """Those of one row, in the order of transformers. prompt: int64 [1, T]."""
        make: dict[str, Callable[[Any], LogitsProcessor]] = {
            "encoder_repetition_penalty": lambda x: EncoderRepetitionPenaltyLogitsProcessor(float(x), prompt),
            "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
            "encoder_no_repeat_ngram_size": lambda x: EncoderNoRepeatNGramLogitsProcessor(x, prompt),
            "min_length": lambda x: MinLengthLogitsProcessor(x, list(eos_ids), device=str(prompt.device)),
        }
        return LogitsProcessorList([make[key](wanted[key]) for key in make if key in wanted])

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids [B x beams, T], scores [B x beams, V]."""
        if not self.rows:
            return scores
        beams = len(scores) // len(self.rows)
        found = [
            self.rows[i // beams](ids[None, self.starts[i // beams] :], row[None])
            for i, (ids, row) in enumerate(zip(input_ids, scores, strict=True))
        ]
        return torch.cat(found)  # type: ignore[return-value]


def left_padded(prompts: Sequence[np.ndarray], pad_id: int, multiple: int = 1) -> dict[str, torch.Tensor]:
    """Pad prompts on the left: input_ids and attention_mask (1: a token), int64 [B, T], T a multiple of `multiple`."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    ids = np.full((len(prompts), width), pad_id, np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def generation_scores(
    tokenizer: PreTrainedTokenizerBase,
    settings: GenerationSettings,
    predictions: Mapping[int, list[int]],
    row: Callable[[int], Row],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Scores of all generated texts, and the first `show` texts as samples.

    Args:
        predictions: row number -> generated token ids.
        row: returns the row of a number. Its meta contains the texts `source` and `reference`.
    """
    texts = {number: generated_text(tokenizer, ids) for number, ids in predictions.items()}
    return scores_of_texts(texts, settings, row)


def scores_of_texts(
    texts: Mapping[int, str], settings: GenerationSettings, row: Callable[[int], Row]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """As `generation_scores`. texts: row number -> generated text."""
    metas = [row(number).meta for number in texts]
    scores = text_scores(list(texts.values()), [meta["reference"] for meta in metas], settings)
    samples = [
        {"row": number, "source": meta["source"], "reference": meta["reference"], "prediction": text}
        for (number, text), meta in zip(texts.items(), metas, strict=True)
    ]
    return scores, samples[: settings.show]


def generated_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of generated token ids."""
    text: Any = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def judged_text(answer: Mapping[str, Any], row: Row, settings: GenerationSettings) -> Judged:
    """A generated text beside its reference, with those metrics that are averages over texts."""
    reference = row.meta["reference"]
    averages = tuple(name for name in settings.metrics if name in ("exact_match", "rouge"))
    scores = text_scores([answer["text"]], [reference], settings.model_copy(update={"metrics": averages}))
    return Judged(answer, reference, {name: (value, 1) for name, value in scores.items()})

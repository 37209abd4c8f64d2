"""Perplexity by token, byte and word, and that of long documents with a sliding window."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ptft_dist.config.load import Loaded
from ptft_dist.data.encoder import EncoderContext
from ptft_dist.data.prepare import records_of
from ptft_dist.data.sides import sided
from ptft_dist.data.store import Row
from ptft_dist.engine import Engine
from ptft_dist.errors import RecipeError
from ptft_dist.judging.rows import RowList
from ptft_dist.reporting.messages import progress
from ptft_dist.tasks.common.causal import NextTokenTask
from ptft_dist.tasks.common.documents import DocumentRows
from ptft_dist.tasks.common.generation import generated_text
from ptft_dist.tasks.common.losses import perplexity
from ptft_dist.tasks.common.scores.text import count_words
from ptft_dist.tasks.protocol import EVALUATION_EPOCH, IGNORE, Batch, LossOut, Task
from ptft_dist.tasks.registry import encoder_class, task_class
from ptft_dist.training.batches import Shape, micro_batch

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def perplexity_of(loss: float, tokens: float, size: int, words: int) -> dict[str, float]:
    """exp(loss / N), where N is the number of tokens, of bytes (UTF-8) or of words; and bits per byte.

    Perplexities by byte or word can be compared between tokenizers. A word has no white space in it; each Chinese or
    Japanese character is a word.

    Args:
        loss: summed negative log-likelihood in nats.
        tokens, size, words: numbers of tokens, bytes and words that it is the sum over.
    """
    return {
        "token": perplexity(loss / (tokens or 1)),
        "byte": perplexity(loss / (size or 1)),
        "word": perplexity(loss / (words or 1)),
        "bits_per_byte": loss / math.log(2) / (size or 1),
        "tokens": int(tokens),
        "bytes": size,
        "words": words,
    }


def count_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """The number of bytes (UTF-8) of tokens, special tokens not included.

    A row may begin or end inside a character, which its text then has as U+FFFD: three bytes, whatever was there.
    """
    text = generated_text(tokenizer, ids)
    if "\ufffd" not in text or not tokenizer.is_fast:
        return len(text.encode())
    if b"ByteLevel" in tokenizer.backend_tokenizer.decoder.__getstate__():  # each character of a token is a byte
        added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
        return sum(
            len(added[i].content.encode()) if i in added else len(str(tokenizer.convert_ids_to_tokens(i)))
            for i in ids
            if i not in special
        )
    one_byte = tokenizer.get_vocab().get("<0x41>")  # SentencePiece's byte fallback, a token for each byte
    if one_byte is None:
        return len(text.encode())
    ascii_ids = [one_byte if _BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(i))) else i for i in ids]
    return len(generated_text(tokenizer, ascii_ids).encode())


class StridedPerplexity:
    """The perplexity of whole documents: a window of data.max_length tokens moves on by `stride` tokens, and each token
    is predicted once, in the first window that has it.

    All tokens but those of the first window have at least max_length - stride tokens before them.
    """

    def __init__(self, loaded: Loaded, tokenizer: PreTrainedTokenizerBase, stride: int) -> None:
        """Read and encode the validation documents.

        Raises:
            RecipeError: the task has no documents, or the stride is no part of the window.
        """
        recipe, self.stride, self.window = loaded.recipe, stride, loaded.recipe.data.max_length
        kind = encoder_class(recipe.task)
        if not (issubclass(kind, DocumentRows) and issubclass(task_class(recipe.task), NextTokenTask)):
            raise RecipeError(
                "--stride: moves a window over documents, to predict each next token; this recipe has another task, "
                f"{recipe.task}"
            )
        if not 0 < stride < self.window:
            raise RecipeError(f"--stride: {stride} is not between 0 and data.max_length ({self.window})")
        encoder = kind(EncoderContext.of(recipe, tokenizer))
        read = sided(recipe.data, records_of(recipe, loaded.base, kind), kind.key)
        self.documents = self.size = self.words = 0
        self.rows: list[Row] = []
        for place, record in read:
            if place.side != "validation" or not record.values["text"].strip():
                continue
            (outcome,) = encoder.outcomes([record])
            for example in outcome.examples:
                ids = np.array(example.columns["input_ids"], np.int64)
                self.documents += 1
                self.size += len(record.values["text"].encode())
                self.size -= count_bytes(tokenizer, ids[:1].tolist())  # it is not predicted
                self.words += count_words(generated_text(tokenizer, ids[1:].tolist()))
                self.rows += windows(ids, self.window, stride)

    def measure(self, engine: Engine, task: Task, shape: Shape) -> dict[str, Any]:
        """`perplexity_of`, window, stride and number of documents; the same on every rank."""
        assert isinstance(task, NextTokenTask)
        store = RowList(self.rows, [len(row.input_ids) for row in self.rows])
        lengths = store.lengths(np.arange(len(store)))
        keys = np.stack([np.full(len(store), EVALUATION_EPOCH), np.arange(len(store))], axis=1)
        micro_tokens = shape.micro_tokens or (shape.micro_size or 1) * self.window
        parts = Shape(shape.rank, shape.world_size, None, micro_tokens, True).split(lengths)
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        collate = partial(_collate, task)
        with engine.evaluating(), progress("measuring the perplexity", len(parts), "micro-batches") as shown:
            for part in parts:
                batch = micro_batch(store, keys[part[shape.rank]], keys[0], collate)
                out = LossOut(*engine.forward(task.loss, batch.inputs))
                assert out.row_losses is not None
                total += out.row_losses.double().sum(0)
                shown.advance()
        loss, tokens = engine.all_sum(*total.unbind()).tolist()
        return {
            **perplexity_of(loss, tokens, self.size, self.words),
            "window": self.window,
            "stride": self.stride,
            "documents": self.documents,
        }


def windows(ids: np.ndarray, length: int, stride: int) -> list[Row]:
    """The windows of a document: rows whose column `scored` is the position of the first token to predict."""
    rows, scored = [], 1
    for start in range(0, len(ids), stride):
        end = min(start + length, len(ids))
        if end > scored:
            columns = {"scored": np.array([scored - start])}
            rows.append(Row(ids[start:end], np.zeros(1, np.int64), columns))
        scored = max(scored, end)
        if end == len(ids):
            break
    return rows


def _collate(task: NextTokenTask, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
    """The task's batch, without the targets before `scored`."""
    batch = task.collate(rows, keys)
    for i, row in enumerate(rows):
        batch.inputs["targets"][i, : int(row.columns["scored"][0]) - 1] = IGNORE
    return batch

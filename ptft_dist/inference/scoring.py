"""Scores texts with a network that has a scalar head, for `ptft score`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ptft_dist.data.encoder import EncoderContext, RowError
from ptft_dist.data.formats import Record, read_file
from ptft_dist.data.order import split_update
from ptft_dist.data.report import BadRows
from ptft_dist.errors import CheckpointError, DataError, RecipeError
from ptft_dist.inference.generation import libraries_restored
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.names import is_adapter
from ptft_dist.reporting.messages import progress
from ptft_dist.reporting.output import check_writable, json_line, write_file
from ptft_dist.tasks.common.last_token import LastToken
from ptft_dist.tasks.common.padding import pad
from ptft_dist.tasks.common.preference_pairs import read_pair, shape_of
from ptft_dist.tasks.common.preference_rows import PreferenceRows
from ptft_dist.tasks.common.preference_settings import PreferenceSettings
from ptft_dist.tasks.common.scores.preferences import preference_scores
from ptft_dist.tasks.common.single_texts import read_text

CHOSEN, REJECTED, TEXT, TRUNCATED = "score_chosen", "score_rejected", "score", "truncated"
"""The fields that are added to a row."""


class _Settings(PreferenceSettings):
    section = "score"


@dataclass(frozen=True)
class Scorer:
    """A network in evaluation mode, with what turns rows into its inputs."""

    model: Any
    last_token: LastToken
    tokenizer: Any
    settings: _Settings
    max_length: int | None
    """Maximum number of tokens in a text; None: no limit."""
    has_token_types: bool
    device: torch.device

    def scores(self, texts: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
        """The scores of texts as token ids: fp32 [N]. Texts of similar length are in one batch."""
        scores = np.zeros(len(texts), np.float32)
        batches = split_update(np.array([len(ids) for ids in texts]), 1, micro_tokens=batch_tokens)
        with torch.inference_mode(), progress("scoring", len(batches), "batches") as shown:
            for (batch,) in batches:
                scores[batch] = self._forward([np.array(texts[i], np.int64) for i in batch])
                shown.advance()
        return scores

    def _forward(self, texts: Sequence[np.ndarray]) -> np.ndarray:
        mask = pad([np.ones(len(ids), np.int64) for ids in texts], 0).to(self.device)
        inputs = {"input_ids": pad(texts, self.model.config.get_text_config().pad_token_id), "attention_mask": mask}
        if self.has_token_types:
            inputs["token_type_ids"] = torch.zeros_like(mask)
        self.last_token.mask = mask
        logits = self.model(**{name: x.to(self.device) for name, x in inputs.items()}).logits
        scores: np.ndarray = logits[:, 0].float().cpu().numpy()
        return scores


def score(model_dir: Path, file: Path, out: Path, *, shape: str | None, batch_tokens: int) -> dict[str, float]:
    """Score the rows of a file; see `api.score`."""
    if out.absolute() == file.absolute():
        raise RecipeError(f"{out}: this is the file with the rows. Name another file for the scores")
    check_writable(out)
    with libraries_restored():
        scorer = load_scorer(model_dir, shape)
    records = list(read_file(file, columns=(), unit="line"))
    fields, texts = _texts(scorer, records)
    truncated = [scorer.max_length is not None and len(ids) > scorer.max_length for ids in texts]
    scores = scorer.scores([ids[: scorer.max_length] for ids in texts], batch_tokens)
    rows: list[dict[str, Any]] = []
    at = 0
    for record, names in zip(records, fields, strict=True):
        part = slice(at, at + len(names))
        more = {TRUNCATED: True} if any(truncated[part]) else {}
        rows.append({**record.values, **dict(zip(names, scores[part].tolist(), strict=True)), **more})
        at = part.stop
    write_file(out, map(json_line, rows))
    return _summary(rows, fields, scores, [len(ids) for ids in texts], sum(truncated))


def load_scorer(model_dir: Path, shape: str | None) -> Scorer:
    """Load a model directory or an adapter directory on its base.

    Args:
        shape: how rows become texts; None: as in training, or `auto`.

    Raises:
        CheckpointError: the network has no scalar head.
        RecipeError: an adapter or its base cannot be loaded.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype: Any = torch.float32 if device.type == "cpu" else "auto"
    virtual = 0
    if is_adapter(model_dir):
        from ptft_dist.networks.adapt.reading import load_adapters, read_adapter

        files = read_adapter(model_dir)
        if files.auto_class is not AutoModelForSequenceClassification:
            raise CheckpointError(_no_scalar_head(model_dir, files.auto_class.__name__))
        base, tokenizer = files.load_base(dtype), files.tokenizer
        last_token, facts = LastToken.of(base), read_facts(base)
        model: Any = load_adapters({"default": files}, "default", dtype, base)
        virtual = int(getattr(files.config, "num_virtual_tokens", None) or 0)
    else:
        config = AutoConfig.from_pretrained(model_dir)
        architecture = str((config.architectures or [""])[0])
        if not architecture.endswith("ForSequenceClassification"):
            raise CheckpointError(_no_scalar_head(model_dir, architecture))
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        last_token, facts = LastToken.of(model), read_facts(model)
    if model.config.num_labels != 1:
        raise CheckpointError(_no_scalar_head(model_dir, f"a classifier of {model.config.num_labels} labels"))
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:  # needed for a batch; the score is read by the attention mask
        text_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    saved = (getattr(model.config, "task_specific_params", None) or {}).get("ptft") or {}
    settings = _Settings.model_validate({"shape": shape or saved.get("shape") or "auto", "system": saved.get("system")})
    positions = None if facts.max_positions is None else facts.max_positions - virtual
    return Scorer(model.to(device).eval(), last_token, tokenizer, settings, positions, facts.has_token_types, device)


def _no_scalar_head(path: Path, what: str) -> str:
    return (
        f"{path}: {what or 'a network of unknown architecture'} does not score texts. Give a sequence classification "
        "network with one label"
    )


def _texts(scorer: Scorer, records: Sequence[Record]) -> tuple[list[tuple[str, ...]], list[list[int]]]:
    """For each record the names of its scores, and the token ids of all texts in order.

    Raises:
        DataError: rows are invalid, with file and line.
    """
    encoder = PreferenceRows(EncoderContext(scorer.settings, scorer.settings.section, scorer.tokenizer, 2**31, 0))
    fields, texts, bad = list[tuple[str, ...]](), list[list[int]](), BadRows()
    for record in records:
        try:
            parsed = dict(_parsed(record.values, scorer.settings))
            if there := [name for name in (*parsed, TRUNCATED) if name in record.values]:
                raise RowError(f"the row has a field {there[0]!r} already, which would be replaced. Rename it.")
            texts += encoder.token_ids(list(parsed.values()))
        except RowError as problem:
            bad.add(record.where, problem)
        else:
            fields.append(tuple(parsed))
    if bad.count:
        more = f"\nand {bad.count - len(bad.first):,} more rows" if bad.count > len(bad.first) else ""
        raise DataError("\n".join(bad.first) + f"{more}\nCorrect or remove these rows.")
    return fields, texts


def _parsed(values: Mapping[str, Any], settings: PreferenceSettings) -> Iterator[tuple[str, Any]]:
    """The texts of a row, by the names of their scores. Raises RowError."""
    if values.get("chosen") is None and values.get("rejected") is None:
        yield TEXT, read_text(values, settings.shape, settings.system)
        return
    shape = settings.shape if settings.shape != "auto" else shape_of(values)
    pair = read_pair(values, shape, settings.system)
    yield from ((CHOSEN, pair.chosen), (REJECTED, pair.rejected))


def _summary(
    rows: Sequence[Mapping[str, Any]],
    fields: Sequence[tuple[str, ...]],
    scores: np.ndarray,
    lengths: Sequence[int],
    truncated: int,
) -> dict[str, float]:
    """Number of rows, mean and standard deviation of the scores, and for pairs the scores of an evaluation."""
    summary: dict[str, float] = {"rows": len(rows), "mean": float(scores.mean()), "std": float(scores.std())}
    if truncated:
        summary[TRUNCATED] = truncated
    starts = np.cumsum([0, *map(len, fields)])[:-1]
    of_pairs = np.array(
        [[start, start + 1] for start, names in zip(starts, fields, strict=True) if len(names) == 2], int
    )
    if len(of_pairs):
        summary |= {"pairs": len(of_pairs), **preference_scores(scores[of_pairs], np.array(lengths)[of_pairs])}
    return summary

"""What a checkpoint must have in common with the recipe that resumes it."""

from __future__ import annotations

import hashlib
from typing import Any

from ptft_dist.config.load import Loaded, public_values

# Keys (or sections) that may change between the parts of one run: where it writes, how it looks at itself, and how the
# machine computes the same mathematics. Everything else matters, new keys too.
FREE = (
    "run_dir",
    "save",
    "eval",
    "log",
    "data.cache_dir",
    "data.workers",
    "data.train",  # what the documents say is compared by the prepared data's fingerprint, not where they lie
    "data.validation",
    "tokenizer",
    "batch.micro_size",
    "batch.micro_tokens",
    "batch.group_by_length",
    "clm.head",
    "sft.head",
    "sft.generation",
    "seq2seq.generation",
    "question_answering.max_answer_length",
    "question_answering.n_best",
    "question_answering.no_answer_margin",
    "model.attention",
    "model.gradient_checkpointing",
    "model.compile",
    "train.deterministic",
)


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted key: value}; lists are values."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}


def identity(loaded: Loaded, data_fingerprint: str) -> dict[str, Any]:
    """The values that make two runs the same run. What a reference stands for may be secret: its hash stands in."""
    free = tuple(f"{key}." for key in FREE)
    plain, public = leaves(loaded.recipe.model_dump(mode="json")), leaves(public_values(loaded))
    values = {key: value if public[key] == value else _hidden(public[key], value) for key, value in plain.items()}
    kept = {key: value for key, value in values.items() if not f"{key}.".startswith(free)}
    return {**kept, "prepared data": data_fingerprint}


def _hidden(written: Any, value: Any) -> str:
    return f"{written} (sha256 {hashlib.sha256(repr(value).encode()).hexdigest()[:12]})"


def differences(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    """Key -> "saved value -> current value", for each key that differs."""
    keys = sorted(saved.keys() | current.keys())
    absent = "(not set)"
    return {
        key: f"{saved.get(key, absent)!r} in the checkpoint, {current.get(key, absent)!r} now"
        for key in keys
        if saved.get(key, absent) != current.get(key, absent)
    }

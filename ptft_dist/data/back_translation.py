"""Texts translated into another language and back by two sequence-to-sequence models (Sennrich et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.data.cache import HashMemo
from ptft_dist.errors import RecipeError
from ptft_dist.reporting.messages import Progress

BATCH = 32  # texts that are translated at once
_LONGEST = 512  # tokens, for models that do not say how many positions they have, such as T5


class BackTranslation:
    """Two models, loaded at the first text. Each text's translation is the greedy one, so it is always the same."""

    def __init__(self, forward: str, backward: str, base: Path) -> None:
        """
        Raises:
            RecipeError: a name can only be a directory, and there is none.
        """
        self.names = {"forward": _place(forward, base), "backward": _place(backward, base)}
        self.models: list[tuple[Any, Any]] = []
        self.progress = Progress("back-translation", unit="texts")

    def there_and_back(self, texts: Sequence[str]) -> dict[str, str]:
        """Text -> what it became; itself, if it is too long for a model.

        Raises:
            RecipeError: a model cannot be loaded.
        """
        if not self.models:
            self.models = [_load(key, name) for key, name in self.names.items()]
        found: dict[str, str] = {}
        # Texts of like length together: little padding.
        waiting = sorted(set(texts), key=lambda text: (len(text), text))
        for start in range(0, len(waiting), BATCH):
            batch = waiting[start : start + BATCH]
            away = _translate(*self.models[0], batch)
            back = _translate(*self.models[1], [text or "" for text in away])
            for text, there, again in zip(batch, away, back, strict=True):
                found[text] = text if there is None or again is None else again
            self.progress.advance(len(batch))
        self.progress.close()
        return found


def _load(key: str, name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # a dozen unrelated types, and all mean that there is no model to go on with
        raise RecipeError(
            f"data.augment: {key}: no sequence-to-sequence model can be loaded from {name}. {error}\nGive a directory "
            "with a model and its tokenizer, or a Hub name that this machine can reach or has in its cache (HF_HOME)."
        ) from error
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _translate(tokenizer: Any, model: Any, texts: Sequence[str]) -> list[str | None]:
    """The greedy translation of each text; None for one that has more tokens than the model has positions."""
    import torch

    longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=longest + 1)
    ids, mask = inputs["input_ids"][:, :longest], inputs["attention_mask"]
    limits = [min(longest - 1, 2 * count + 10) for count in mask.sum(1).tolist()]
    with torch.inference_mode():
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask[:, :longest].to(model.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(limits),
        )
    # A text's own limit, and not that of the longest beside it: its translation is a function of it alone.
    own = [row[: limit + 1] for row, limit in zip(written, limits, strict=True)]
    found = tokenizer.batch_decode(own, skip_special_tokens=True)
    return [None if int(m.sum()) > longest else text.strip() for m, text in zip(mask, found, strict=True)]


def _place(name: str, base: Path) -> str:
    """A directory beside the recipe, or from here; else a name of the Hub.

    Raises:
        RecipeError: it can only be a directory, and there is none.
    """
    given = Path(name).expanduser()
    for candidate in (base / given, given.absolute()):
        if candidate.is_dir():
            return str(candidate)
    if given.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise RecipeError(f"data.augment: there is no directory {name}, neither in {base} nor in {Path.cwd()}.")
    return name


def model_contents(name: str, base: Path, memo: HashMemo) -> list[Any]:
    """What decides a model's translations: its files, or the Hub's name for it; and the library that runs it."""
    place = Path(_place(name, base))
    files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else []
    return [[file.name for file in files], memo.digests(files), name if not files else None, version("transformers")]

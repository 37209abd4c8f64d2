"""Back-translation: translate texts into another language and back with two models (Sennrich et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.config.places import local_directory
from ptft_dist.data.cache import HashMemo
from ptft_dist.data.tokenizer import marks_languages
from ptft_dist.errors import RecipeError
from ptft_dist.reporting.messages import Progress

BATCH = 32  # texts per batch
_LONGEST = 512  # tokens, for models without max_position_embeddings, such as T5


class BackTranslation:
    """Translates texts with two models, which are loaded at the first text. Decoding is greedy, so deterministic."""

    def __init__(self, forward: str, backward: str, base: Path) -> None:
        """forward, backward: directories or Hub names of the models; base: where relative paths start.

        Raises:
            RecipeError: a path of a directory does not exist.
        """
        self.names = {"forward": _place(forward, base), "backward": _place(backward, base)}
        self.models: list[tuple[Any, Any]] = []
        self.progress = Progress("back-translation", unit="texts")

    def there_and_back(self, texts: Sequence[str]) -> dict[str, str]:
        """The back-translation of each text; the text itself if it is too long for a model.

        Raises:
            RecipeError: a model cannot be loaded.
        """
        if not self.models:
            self.models = [_load(key, name) for key, name in self.names.items()]
        results: dict[str, str] = {}
        # Batches of similar lengths need less padding.
        pending = sorted(set(texts), key=lambda text: (len(text), text))
        for start in range(0, len(pending), BATCH):
            batch = pending[start : start + BATCH]
            forward = _translate(*self.models[0], batch)
            backward = _translate(*self.models[1], [text or "" for text in forward])
            for text, translated, result in zip(batch, forward, backward, strict=True):
                results[text] = text if translated is None or result is None else result
            self.progress.advance(len(batch))
        self.progress.close()
        return results


def _load(key: str, name: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=torch.float32)
    except Exception as error:  # transformers raises a dozen unrelated types if there is no model
        raise RecipeError(
            f"data.augment: {key}: no sequence-to-sequence model can be loaded from {name}. {error}\nGive a directory "
            "with a model and its tokenizer, or a Hub name that this machine can reach or has in its cache (HF_HOME)."
        ) from error
    if marks_languages(tokenizer) and not _has_target(tokenizer, model.generation_config):
        raise RecipeError(
            f"data.augment: {key}: {name} marks texts with their language, and its generation_config.json names none "
            "to translate into. Use a model of one direction, such as opus-mt-en-de; or set forced_bos_token_id there, "
            "and src_lang in its tokenizer_config.json."
        )
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _has_target(tokenizer: Any, generation: Any) -> bool:
    """Whether each translation begins with the mark of one language."""
    first = (
        generation.decoder_start_token_id if generation.forced_bos_token_id is None else generation.forced_bos_token_id
    )
    return first not in (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _translate(tokenizer: Any, model: Any, texts: Sequence[str]) -> list[str | None]:
    """The greedy translation of each text; None for a text with more tokens than the model has positions."""
    import torch

    longest = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=longest + 1)
    ids, mask = inputs["input_ids"][:, :longest], inputs["attention_mask"]
    limits = [min(longest - 1, 2 * count + 10) for count in mask.sum(1).tolist()]
    with torch.inference_mode():
        generated = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask[:, :longest].to(model.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(limits),
        )
    # Apply each text's own limit, so that its translation does not depend on the other texts of the batch.
    limited = [row[: limit + 1] for row, limit in zip(generated, limits, strict=True)]
    translations = tokenizer.batch_decode(limited, skip_special_tokens=True)
    return [None if int(m.sum()) > longest else text.strip() for m, text in zip(mask, translations, strict=True)]


def _place(name: str, base: Path) -> str:
    """A directory, relative to the recipe or else to the current directory; otherwise a Hub name.

    Raises:
        RecipeError: the name has the form of a path, and there is no such directory.
    """
    return str(local_directory(name, base, "data.augment") or name)


def model_contents(name: str, base: Path, memo: HashMemo) -> list[Any]:
    """Everything that affects a model's translations: its files or Hub name, and the version of transformers."""
    place = Path(_place(name, base))
    files = sorted(path for path in place.iterdir() if path.is_file()) if place.is_dir() else []
    return [[file.name for file in files], memo.digests(files), name if not files else None, version("transformers")]

"""Data augmentation of labelled texts: synonym replacement, word swaps, word deletion, and back-translation.

Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification Tasks";
Sennrich et al. 2016 (back-translation). A copy is a pure function of train.seed, the row, the index of the method in
the recipe and the number of the copy. It does not depend on the order of rows.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptft_dist.config.places import expanded
from ptft_dist.config.recipe import Augmentation, Recipe
from ptft_dist.data.back_translation import BackTranslation, model_contents
from ptft_dist.data.cache import HashMemo, fingerprint
from ptft_dist.data.chunks import SidedRecord
from ptft_dist.data.formats import Record
from ptft_dist.data.report import Notes
from ptft_dist.errors import DataError

SHARE = 0.1
_TEXTS = ("text", "text_pair")
_LETTERS = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)  # punctuation before a word, the word, punctuation after it


class Augmentations:
    """The step of the data stream that adds the augmented copies of data.augment.

    Only valid training rows are copied. The copies of a row directly follow it in the stream.
    """

    name = "augment"

    def __init__(
        self,
        recipe: Recipe,
        base: Path,
        usable: Callable[[Record], bool] = lambda _record: True,
    ) -> None:
        """usable: returns whether a row passes the task's check.

        Raises:
            DataError: a file of synonyms is missing or malformed.
            RecipeError: the directory of a translation model does not exist.
        """
        self.seed, self.methods, self.notes, self.base = recipe.train.seed, recipe.data.augment, Notes(), base
        self.texts = [role for role in _TEXTS if role in recipe.settings.roles]
        self.synonyms = [read_synonyms(_path(base, m.synonyms)) if m.synonyms else {} for m in self.methods]
        self._usable = usable
        self.translations = [
            BackTranslation(m.forward, m.backward, base) if m.forward and m.backward else None for m in self.methods
        ]

    def fingerprint(self, memo: HashMemo) -> list[Any]:
        """Everything that affects the copies, as JSON: settings and contents of files.

        Raises:
            DataError: a file cannot be read.
        """
        contents: list[Any] = []
        for method in self.methods:
            settings = method.model_dump(exclude={"synonyms", "forward", "backward"})
            if method.synonyms:
                settings["synonyms"] = memo.digests([_path(self.base, method.synonyms)])
            for name in (method.forward, method.backward):
                if name:
                    settings.setdefault("models", []).append(model_contents(name, self.base, memo))
            contents.append(settings)
        return contents

    def apply(self, chunk: Sequence[SidedRecord]) -> list[SidedRecord]:
        """The rows of a chunk, with the copies of each valid training row after it."""
        rows = [i for i, (place, record) in enumerate(chunk) if place.side == "train" and self._usable(record)]
        copies = dict(zip(rows, self.copies_of([chunk[i][1] for i in rows]), strict=True))
        return [(place, each) for i, (place, record) in enumerate(chunk) for each in (record, *copies.get(i, ()))]

    def copies(self, record: Record) -> Iterator[Record]:
        """The augmented copies of one row, in the order of the recipe's methods."""
        return iter(self.copies_of([record])[0])

    def copies_of(self, records: Sequence[Record]) -> list[list[Record]]:
        """The augmented copies of each row. The texts of all rows are translated in batches."""
        copies: list[list[Record]] = [[] for _ in records]
        for number, method in enumerate(self.methods):
            translated = self._translated(number, records)
            for record, row_copies in zip(records, copies, strict=True):
                new_texts = self._new_texts(number, method, record, translated)
                row_copies += [
                    Record({**record.values, **texts}, f"{record.where} (copy {len(row_copies) + i})")
                    for i, texts in enumerate(new_texts, 1)
                ]
                self._note(method, len(new_texts), record.where)
        return copies

    def _note(self, method: Augmentation, copies: int, where: str) -> None:
        if copies == method.copies:
            reason = "augmented"
        elif copies:
            reason = "augmented with fewer copies than requested: some were identical"
        elif method.method == "back_translation":
            reason = "not augmented: the translation is the same text, or the text is too long to translate"
        else:
            reason = "not augmented: no word can be changed"
        self.notes.add(f"{reason} ({method.method})", where)

    def _translated(self, number: int, records: Sequence[Record]) -> Mapping[str, str]:
        translation = self.translations[number]
        if translation is None:
            return {}
        return translation.there_and_back([record.values[role] for record in records for role in self.texts])

    def _new_texts(
        self, number: int, method: Augmentation, record: Record, translated: Mapping[str, str]
    ) -> list[dict[str, str]]:
        """The texts of each copy (role -> text), without unchanged and duplicate copies."""
        original = {role: record.values[role] for role in self.texts}
        key = fingerprint([self.seed, number, json.dumps(record.values, sort_keys=True, default=str)])
        copies: list[dict[str, str]] = []
        for number_of_copy in range(method.copies):
            rng = random.Random(f"{key} {number_of_copy}")
            if method.method == "back_translation":
                copy = {role: translated[text] for role, text in original.items()}
            else:
                copy = {r: changed(text, method, self.synonyms[number], rng) for r, text in original.items()}
            if copy != original and copy not in copies and all(text.strip() for text in copy.values()):
                copies.append(copy)
        return copies


def changed(text: str, method: Augmentation, synonyms: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """The text with a fraction of its words changed, at least one; unchanged if no word can be changed.

    The white space between words is kept.
    """
    by_character = method.unit == "character"
    words = list(text) if by_character else re.split(r"(\s+)", text)
    indices = [i for i, word in enumerate(words) if word.strip()]
    count = max(1, math.floor((method.share or SHARE) * len(indices)))
    if method.method == "synonym":
        replaceable = [i for i in indices if _replacements(words[i], synonyms)]
        for i in rng.sample(replaceable, min(count, len(replaceable))):
            words[i] = rng.choice(_replacements(words[i], synonyms))
    elif method.method == "swap":
        _swap(words, indices, count, rng)
    elif len(indices) > 1:
        for i in rng.sample(indices, min(count, len(indices) - 1)):  # at least one word is kept
            words[i] = ""
            if not by_character and i + 1 < len(words):
                words[i + 1] = ""  # the white space after the word
        return "".join(words).strip()
    return "".join(words)


def _swap(words: list[str], indices: Sequence[int], count: int, rng: random.Random) -> None:
    """Swap pairs of different words in place: count / 2 pairs, at least one."""
    remaining = max(1, count // 2)
    waiting: deque[int] = deque()  # indices of equal words without a partner
    for i in rng.sample(indices, len(indices)):
        if not waiting or words[i] == words[waiting[0]]:
            waiting.append(i)
            continue
        other = waiting.popleft()
        words[i], words[other] = words[other], words[i]
        remaining -= 1
        if not remaining:
            return


def _replacements(word: str, synonyms: Mapping[str, Sequence[str]]) -> list[str]:
    """The synonyms of a word. Punctuation around it and a capital first letter are kept."""
    match = _LETTERS.fullmatch(word)
    assert match is not None  # every part may be empty
    before, core, after = match.groups()
    options = synonyms.get(core) or [_capital(s) if core[:1].isupper() else s for s in synonyms.get(core.lower(), ())]
    return [f"{before}{synonym}{after}" for synonym in options if synonym != core]


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Read a file with lines `word<TAB>synonym,synonym`. Empty lines and lines that begin with # are skipped.

    Raises:
        DataError: the file cannot be read, or a line is malformed; the message names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(
            f"data.augment: synonyms: {path}: cannot be read ({error.strerror}). A relative path starts at the "
            "recipe's directory."
        ) from None
    except UnicodeDecodeError as error:
        at = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{at}: this is not UTF-8 text. Convert the file.") from None
    table: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        word, tab, rest = line.rstrip("\r").partition("\t")
        word, synonyms = word.strip(), [synonym.strip() for synonym in rest.split(",")]
        if not tab or not word or not all(synonyms):
            raise DataError(
                f"{path}:{number}: expected a word, a tab, and its synonyms separated by commas; got {line[:80]!r}."
            )
        if word in table:
            raise DataError(f"{path}:{number}: {word!r} already has a line above. Put all its synonyms in one line.")
        table[word] = synonyms
    if not table:
        raise DataError(f"{path}: the file has no synonyms. Fill it, or remove the method from data.augment.")
    return table


def _path(base: Path, given: str) -> Path:
    return base / expanded(given)

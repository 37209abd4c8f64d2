"""Changed copies of labelled texts: words replaced by synonyms, swapped or deleted, or texts translated there and back.

Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting Performance on Text Classification Tasks";
Sennrich et al. 2016 (back-translation). What a copy is like follows from train.seed, the row, the method's place in the
recipe and the copy's number, and not from the order in which rows are read.
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

from ptft_dist.config.recipe import Augmentation, Recipe
from ptft_dist.data.back_translation import BackTranslation, model_contents
from ptft_dist.data.cache import HashMemo, fingerprint
from ptft_dist.data.formats import Record
from ptft_dist.data.report import Notes
from ptft_dist.data.stream import SidedRecord
from ptft_dist.errors import DataError

SHARE = 0.1
_TEXTS = ("text", "text_pair")
_LETTERS = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)  # what stands before and after a word: quotes, a full stop


class Augmentations:
    """The step of the data stream that adds the copies that data.augment asks for.

    Only training rows are copied, and a copy follows its original row: it is on the same side, and bad rows have none.
    The copies are a pure function of the seed and the row.
    """

    name = "augment"

    def __init__(
        self,
        recipe: Recipe,
        base: Path,
        usable: Callable[[Record], bool] = lambda _record: True,
    ) -> None:
        """usable: whether a row passes the task's check.

        Raises:
            DataError: a file of synonyms is missing or malformed.
            RecipeError: a translation model is a directory that is not there.
        """
        self.seed, self.methods, self.notes, self.base = recipe.train.seed, recipe.data.augment, Notes(), base
        self.texts = [role for role in _TEXTS if role in recipe.settings.roles]
        self.synonyms = [read_synonyms(_path(base, m.synonyms)) if m.synonyms else {} for m in self.methods]
        self._usable = usable
        self.translations = [
            BackTranslation(m.forward, m.backward, base) if m.forward and m.backward else None for m in self.methods
        ]

    def fingerprint(self, memo: HashMemo) -> list[Any]:
        """Settings and contents of the files that decide the copies: JSON.

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
        """Each row, and after each good training row its copies."""
        rows = [i for i, (side, record) in enumerate(chunk) if side == "train" and self._usable(record)]
        copies = dict(zip(rows, self.copies_of([chunk[i][1] for i in rows]), strict=True))
        return [(side, each) for i, (side, record) in enumerate(chunk) for each in (record, *copies.get(i, ()))]

    def copies(self, record: Record) -> Iterator[Record]:
        """The changed copies of one row, in the order of the recipe."""
        return iter(self.copies_of([record])[0])

    def copies_of(self, records: Sequence[Record]) -> list[list[Record]]:
        """The changed copies of each row. Texts are translated together."""
        copies: list[list[Record]] = [[] for _ in records]
        for number, method in enumerate(self.methods):
            translated = self._translated(number, records)
            for record, theirs in zip(records, copies, strict=True):
                made = self._made(number, method, record, translated)
                theirs += [
                    Record({**record.values, **texts}, f"{record.where} (copy {len(theirs) + i})")
                    for i, texts in enumerate(made, 1)
                ]
                self._note(method, len(made), record.where)
        return copies

    def _note(self, method: Augmentation, made: int, where: str) -> None:
        if made == method.copies:
            reason = "copied with changes"
        elif made:
            reason = "with fewer copies than asked for: some came out the same"
        elif method.method == "back_translation":
            reason = "not copied: the translation is the same text, or the text is too long to translate"
        else:
            reason = "not copied: nothing in them can change"
        self.notes.add(f"{reason} ({method.method})", where)

    def _translated(self, number: int, records: Sequence[Record]) -> Mapping[str, str]:
        translation = self.translations[number]
        if translation is None:
            return {}
        return translation.there_and_back([record.values[role] for record in records for role in self.texts])

    def _made(
        self, number: int, method: Augmentation, record: Record, translated: Mapping[str, str]
    ) -> list[dict[str, str]]:
        """The texts of each copy; only copies in which something has changed, and no two that are the same."""
        before = {role: record.values[role] for role in self.texts}
        key = fingerprint([self.seed, number, json.dumps(record.values, sort_keys=True, default=str)])
        made: list[dict[str, str]] = []
        for copy in range(method.copies):
            chance = random.Random(f"{key} {copy}")
            if method.method == "back_translation":
                after = {role: translated[text] for role, text in before.items()}
            else:
                after = {r: changed(text, method, self.synonyms[number], chance) for r, text in before.items()}
            if after != before and after not in made and all(text.strip() for text in after.values()):
                made.append(after)
        return made


def changed(text: str, method: Augmentation, synonyms: Mapping[str, Sequence[str]], chance: random.Random) -> str:
    """The text with a share of its words changed, at least one; as it was, if there is nothing to change. What stands
    between the words stays."""
    by_character = method.unit == "character"
    words = list(text) if by_character else re.split(r"(\s+)", text)
    places = [i for i, word in enumerate(words) if word.strip()]
    count = max(1, math.floor((method.share or SHARE) * len(places)))
    if method.method == "synonym":
        known = [i for i in places if _options(words[i], synonyms)]
        for i in chance.sample(known, min(count, len(known))):
            words[i] = chance.choice(_options(words[i], synonyms))
    elif method.method == "swap":
        _swap(words, places, count, chance)
    elif len(places) > 1:
        for i in chance.sample(places, min(count, len(places) - 1)):  # one stays
            words[i] = ""
            if not by_character and i + 1 < len(words):
                words[i + 1] = ""  # the space behind it
        return "".join(words).strip()
    return "".join(words)


def _swap(words: list[str], places: Sequence[int], count: int, chance: random.Random) -> None:
    """Pairs of different words change places: as many as have `count` words in them, at least one pair."""
    left = max(1, count // 2)
    waiting: deque[int] = deque()  # places of one and the same word
    for i in chance.sample(places, len(places)):
        if not waiting or words[i] == words[waiting[0]]:
            waiting.append(i)
            continue
        other = waiting.popleft()
        words[i], words[other] = words[other], words[i]
        left -= 1
        if not left:
            return


def _options(word: str, synonyms: Mapping[str, Sequence[str]]) -> list[str]:
    """What the word may become: punctuation around it stays, and so does a capital at its beginning."""
    match = _LETTERS.fullmatch(word)
    assert match is not None  # every part may be empty
    before, core, after = match.groups()
    found = synonyms.get(core) or [_capital(s) if core[:1].isupper() else s for s in synonyms.get(core.lower(), ())]
    return [f"{before}{synonym}{after}" for synonym in found if synonym != core]


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Lines `word<TAB>synonym,synonym`; empty lines and those that begin with # are skipped.

    Raises:
        DataError: the file cannot be read, or a line is not like that; by file and line.
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
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        word, tab, rest = line.rstrip("\r").partition("\t")
        word, synonyms = word.strip(), [synonym.strip() for synonym in rest.split(",")]
        if not tab or not word or not all(synonyms):
            raise DataError(
                f"{path}:{number}: expected a word, a tab, and its synonyms with commas between; found {line[:80]!r}."
            )
        if word in found:
            raise DataError(f"{path}:{number}: {word!r} has a line above already. Put all its synonyms in one line.")
        found[word] = synonyms
    if not found:
        raise DataError(f"{path}: the file has no synonyms. Fill it, or remove the method from data.augment.")
    return found


def _path(base: Path, given: str) -> Path:
    return base / Path(given).expanduser()

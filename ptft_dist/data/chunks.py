"""Records in groups that are processed together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from ptft_dist.data.encoder import Place
from ptft_dist.data.formats import Record

CHUNK_CHARACTERS = 1_000_000  # per call of the tokenizer, which needs about 100 bytes of memory per character
_GIANT_CHARACTERS = 20_000_000

SidedRecord = tuple[Place, Record]


def chunked(records: Iterable[SidedRecord], most: int) -> Iterator[list[SidedRecord]]:
    """Group records into lists of at most `most` records and a few MB."""
    chunk: list[SidedRecord] = []
    size = 0
    for place, record in records:
        characters = sum(len(value) for value in record.values.values() if isinstance(value, str))
        if characters > _GIANT_CHARACTERS:
            logging.getLogger("ptft").warning(
                "%s: this record has %d million characters; encoding it takes about %d GB of memory. Split it into "
                "smaller ones (for .txt files: document: paragraph).",
                record.where,
                characters / 1e6,
                characters * 150 / 1e9,
            )
        chunk.append((place, record))
        size += characters
        if size >= CHUNK_CHARACTERS or len(chunk) >= most:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk

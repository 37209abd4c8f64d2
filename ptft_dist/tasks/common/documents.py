"""Encoders of documents for pretraining tasks: plain texts, packed or one document per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.config.recipe import DocumentSettings, Source
from ptft_dist.data.encoder import Encoder, EncoderContext, Example, Outcome, Side
from ptft_dist.data.formats import Document, Record
from ptft_dist.data.report import Entry
from ptft_dist.data.sources import read_documents
from ptft_dist.data.store import StoreWriter, TokenStore
from ptft_dist.data.tokenizer import DocumentEncoder, adds_bos

EMPTY = "without text"


class Documents(Encoder):
    """Base class of encoders that read documents: records with one column, `text`."""

    reads = "document"
    chunk_records = 100_000
    uses_processes = False

    @classmethod
    def read(cls, settings: Any, source: Source, base: Path) -> Iterator[Record]:  # noqa: ARG003
        return (Record({"text": document.text}, document.where) for document in read_documents(source, base))

    @classmethod
    def key(cls, record: Record) -> str:
        return str(record.values["text"])

    @classmethod
    def texts(cls, settings: Any, record: Record) -> Iterator[str]:  # noqa: ARG003
        yield record.values["text"]

    @classmethod
    def text_settings(cls, settings: Any, common: Mapping[str, Any]) -> list[Any]:  # noqa: ARG003
        return []

    def outcomes(self, records: Sequence[Record]) -> list[Outcome]:
        documents = [Document(record.values["text"], record.where) for record in records]
        encoded = iter(self.encode([document for document in documents if document.text.strip()]))
        return [next(encoded) if document.text.strip() else Outcome(dropped=EMPTY) for document in documents]

    def encode(self, documents: Sequence[Document]) -> list[Outcome]:
        """The outcome of each document. The documents contain more than white space."""
        raise NotImplementedError


class DocumentRows(Documents):
    """Encodes each document with the task's boundary tokens (such as BOS and EOS) into a token store."""

    store = TokenStore
    mergeable = True
    settings: DocumentSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        boundaries = self.settings.boundaries(adds_bos=adds_bos(self.tokenizer))
        self.encoder = DocumentEncoder(self.tokenizer, boundaries)

    @classmethod
    def store_settings(
        cls,
        settings: DocumentSettings,
        common: Mapping[str, Any],  # noqa: ARG003
        adds_bos: Callable[[], bool],
    ) -> dict[str, Any]:
        """The settings that identify a store. Tasks with equal packing and boundary tokens share one."""
        boundaries = settings.boundaries(adds_bos=False)
        if boundaries != settings.boundaries(adds_bos=True):
            boundaries = settings.boundaries(adds_bos=adds_bos())
        return {"packing": settings.packing, "boundaries": boundaries}

    def warnings(self) -> list[str]:
        warning = self.encoder.disagreement() if self.settings.like_inputs else None
        return [] if warning is None else [warning]

    def encode(self, documents: Sequence[Document]) -> list[Outcome]:
        return [self._outcome(ids) for ids in self.encoder.encode(documents)]

    def _outcome(self, ids: np.ndarray) -> Outcome:
        if not len(ids):
            return Outcome(dropped=EMPTY)
        unknown = 0 if self.encoder.unknown_id is None else int(np.count_nonzero(ids == self.encoder.unknown_id))
        return Outcome([Example({"input_ids": ids})], unknown_tokens=unknown)

    def writer(self, path: Path, side: Side) -> DocumentWriter:  # noqa: ARG002
        return DocumentWriter(
            StoreWriter(
                path,
                vocab_size=self.encoder.vocab_size,
                max_length=self.max_length,
                packing=self.settings.packing,
            )
        )


class DocumentWriter:
    """Writes the token ids of documents to a token store."""

    def __init__(self, store: StoreWriter) -> None:
        self.notes: dict[str, Entry] = {}
        self._store = store

    def add(self, example: Example) -> None:
        self._store.add(example.columns["input_ids"])

    def extend(self, part: Path) -> None:
        self._store.extend(part)

    def close(self) -> dict[str, Any]:
        return self._store.close()

"""Reads text files, compressed ones too, line by line. Every error names the file, and the line if it has one."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ptft_dist.errors import DataError

COMPRESSIONS = (".gz", ".zst")


@contextmanager
def opened_lines(path: Path, compression: str) -> Iterator[Iterator[str]]:
    """The lines of a UTF-8 file with their endings, without a byte order mark.

    compression: one of COMPRESSIONS, or empty.

    Raises:
        DataError: the file cannot be read, is damaged, or is not UTF-8; also while its lines are read.
    """
    with _open(path, compression) as stream:
        yield _decode(stream, path)


def _decode(stream: BinaryIO, path: Path) -> Iterator[str]:
    """The lines of a UTF-8 stream with their endings, without a byte order mark."""
    offset = 0
    for number, line in enumerate(stream, 1):
        body = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        offset += len(line)
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            position = offset - len(body) + error.start
            raise DataError(
                f"{path}:{number}: byte 0x{body[error.start]:02x} at offset {position} of the file is not UTF-8 "
                f"({error.reason}). Convert the file, for example with: iconv -f OLD_ENCODING -t UTF-8"
            ) from None
        yield text


@contextmanager
def _open(path: Path, compression: str) -> Iterator[BinaryIO]:
    """Open a file for reading decompressed bytes. Converts errors of reading to DataError."""
    import zstandard

    try:
        with path.open("rb") as raw:
            if compression == ".gz":
                yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
            elif compression == ".zst":
                yield cast(BinaryIO, io.BufferedReader(_ZstdStream(raw), buffer_size=2**17))
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}: the compressed file is truncated or damaged ({error}). Create or download it again."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the file and its permissions.") from error


class _ZstdStream(io.RawIOBase):
    """Decompresses Zstandard frames. Unlike the library's own reader, it detects a truncated file."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
        self._frame = self._new_frame()
        self._in_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                rest = self._frame.unused_data
                self._frame, self._in_frame = self._new_frame(), False
            else:
                rest = b""
            compressed = rest or self._raw.read(2**17)
            if not compressed:
                if self._in_frame:
                    raise EOFError("a frame ends too early")
                return 0
            self._in_frame = True
            self._ready = memoryview(self._frame.decompress(compressed))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

"""A quick look at the first row of each file, for `ptft config check`: are the columns there that the task needs?"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.encoder import Encoder, RowError
from ptft_dist.data.formats import file_format
from ptft_dist.data.sources import source_files
from ptft_dist.errors import DataError

_MOST_FILES = 200  # of a source
_MOST_BYTES = 2**24  # of a file that is read whole for its first row
_READ_WHOLE = (".txt", ".json")
_IF_SKIPPED = 100  # rows, all of which must be unusable if some may be: data.bad_rows: skip, or data.steps drop them


def check_first_rows(recipe: Recipe, base: Path, encoder: type[Encoder]) -> None:
    """Check the first row of each file of data.train and data.validation, as `prepare` checks all rows.

    Raises:
        DataError: the first unusable file of each source, with the reason.
    """
    validation = recipe.data.validation
    sources = [*recipe.data.train, *(validation if isinstance(validation, list) else ())]
    problems = [_problem(recipe, source, base, encoder) for source in sources if source.path is not None]
    if found := [problem for problem in problems if problem is not None]:
        raise DataError("\n".join(dict.fromkeys(found)))


def _problem(recipe: Recipe, source: Source, base: Path, encoder: type[Encoder]) -> str | None:
    rows = 1 if recipe.data.bad_rows == "stop" and not recipe.data.steps else _IF_SKIPPED
    for file in islice(source_files(source, base), _MOST_FILES):
        kind = file_format(file)
        if kind is None or (kind[0] in _READ_WHOLE and file.stat().st_size > _MOST_BYTES):
            continue
        part = source.model_copy(update={"path": str(file.absolute()), "limit": min(rows, source.limit or rows)})
        if problem := _of_file(recipe, part, base, encoder):
            return problem
    return None


def _of_file(recipe: Recipe, file: Source, base: Path, encoder: type[Encoder]) -> str | None:
    """Why none of the rows of a file can be used; None if one can."""
    first: str | None = None
    try:
        for record in encoder.read(recipe.settings, file, base):
            try:
                encoder.check(recipe.settings, record)
            except RowError as problem:
                first = first or f"{record.where}: {problem}"
            else:
                return None
    except DataError as problem:  # also of a mapped column that no row has, which explains the rows' problems
        text = str(problem)
        return f"{file.path}: {text}" if text.startswith("fields: ") else text
    return first

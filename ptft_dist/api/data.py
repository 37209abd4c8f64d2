"""What a recipe reads: its data, its tokenizer, and files of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptft_dist.api.calls import Overrides, Source, hiding_secrets
from ptft_dist.api.recipes import load_recipe
from ptft_dist.config.load import Loaded
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from ptft_dist.data.inspection import Inspection
    from ptft_dist.data.prepare import Prepared
    from ptft_dist.data.trained_tokenizer import TokenizerReport
    from ptft_dist.hub import Fetched


@hiding_secrets
def prepare(source: Source, overrides: Overrides = ()) -> Prepared:
    """Prepare a recipe's data in the cache, or reuse them from there. Raises RecipeError and DataError."""
    from ptft_dist.data.prepare import prepare as run
    from ptft_dist.data.sources import check_sources
    from ptft_dist.tasks.registry import encoder_class

    loaded = load_recipe(source, overrides)
    check_sources(loaded.recipe, loaded.base)
    return run(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))


@hiding_secrets
def inspect_data(source: Source, overrides: Overrides = (), *, samples: int = 5) -> Inspection:
    """What the prepared data of a recipe look like; prepares them if necessary.

    Args:
        source: a recipe, or the directory of prepared stores: `<cache>/stores/<fingerprint>`.
        samples: number of rows that are decoded.

    Raises:
        RecipeError: there is no such recipe or store, or a store is given overrides.
        DataError: the data cannot be prepared, or are damaged.
    """
    from ptft_dist.data.inspection import inspect_prepared, inspect_stores, is_stores
    from ptft_dist.data.prepare import records_of
    from ptft_dist.tasks.registry import encoder_class

    if isinstance(source, str | Path) and is_stores(Path(source)):
        if overrides:
            raise RecipeError(f"{next(iter(overrides))}: prepared data cannot be changed; name their recipe instead")
        return inspect_stores(Path(source), samples=samples)
    loaded = load_recipe(source, overrides)
    prepared = prepare(source, overrides)
    kind = encoder_class(loaded.recipe.task)
    return inspect_prepared(prepared, loaded.recipe, kind, records_of(loaded.recipe, loaded.base, kind), samples)


@hiding_secrets
def verify_data(source: Source, overrides: Overrides = ()) -> list[tuple[Path, int]]:
    """Read all bytes of prepared data, and compare them with their checksums: store and size in bytes.

    Args:
        source: a recipe, whose data are prepared if necessary, or a directory of prepared stores.

    Raises:
        DataError: a file is missing, or its contents have changed.
    """
    from ptft_dist.data.inspection import is_stores, stores_of
    from ptft_dist.data.store import verify

    if isinstance(source, str | Path) and is_stores(Path(source)):
        stores = stores_of(Path(source))
    else:
        stores = stores_of(prepare(source, overrides).train.path.parent)
    return [(store, verify(store)) for store in stores]


@hiding_secrets
def train_tokenizer(
    source: Source, overrides: Overrides = (), *, out: str | Path | None = None, compare: Sequence[str] = ()
) -> TokenizerReport:
    """Write the tokenizer that `prepare` trains or extends for a recipe, and measure it on the recipe's texts.

    A recipe that takes a tokenizer as it is gets a report only, and nothing is written.

    Args:
        out: the target. Default: RUN_DIR/tokenizer. The report lies beside it. If the directory has the tokenizer of
            the same settings and data, nothing is done.
        compare: directories and Hub names of other tokenizers, which are measured too.

    Raises:
        RecipeError: `out` has other files, or there is nothing to write there; or a tokenizer cannot be loaded.
        DataError: a source is missing or malformed.
    """
    from ptft_dist.data.trained_tokenizer import TrainedTokenizer
    from ptft_dist.tasks.registry import encoder_class

    loaded = load_recipe(source, overrides)
    target = Path(out) if out is not None else Path(loaded.recipe.run_dir) / "tokenizer"
    tokenizer = TrainedTokenizer(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task), compare)
    if tokenizer.writes:
        return tokenizer.write(target.absolute())
    if out is not None:
        raise RecipeError(
            f"--out: has no effect here: the recipe takes the tokenizer of {loaded.recipe.tokenizer.path} as it is. "
            "Set tokenizer.train, add or extend, or remove --out"
        )
    return tokenizer.report()


@hiding_secrets
def prefetch(source: Source, overrides: Overrides = ()) -> list[Fetched]:
    """Fetch a recipe's models, tokenizers and data sets from the Hub into the local caches, for nodes without internet.

    Returns what the recipe names, and where it lies; also local files. Raises RecipeError and DataError.
    """
    from ptft_dist.hub import prefetch as run

    return run(load_recipe(source, overrides))


@hiding_secrets
def missing_offline(loaded: Loaded) -> list[str]:
    """What a node without internet would not find in the local caches of the Hub; imports no torch. See `prefetch`."""
    from ptft_dist.hub import missing_offline as run

    return run(loaded)


@hiding_secrets
def input_fingerprint(loaded: Loaded) -> str:
    """A hash of the source files of a recipe's data and tokenizer, without preparing the data.

    Files that have not changed since they were last hashed are not read. Raises RecipeError and DataError.
    """
    from ptft_dist.data.prepare import input_fingerprint as run
    from ptft_dist.tasks.registry import encoder_class

    return run(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))

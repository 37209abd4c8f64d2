"""What a recipe needs from the Hugging Face Hub: fetches it into the local caches, for nodes without internet, and says
what is not there. Does not import torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ptft_dist.config.load import Loaded
from ptft_dist.config.named_models import NamedModel, named_models
from ptft_dist.config.recipe import Source
from ptft_dist.data.sources import hub_dataset, recipe_sources, source_files
from ptft_dist.errors import DataError, PtftError, RecipeError
from ptft_dist.networks.names import ADAPTER_CONFIG, adapter_base, directory_or_hub_name, is_adapter

_SAFETENSORS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors")
_PICKLED = re.compile(r"(pytorch|adapter)_model(-\d+-of-\d+)?\.bin")
_SUFFIXES = "safetensors bin pt pth ckpt h5 msgpack gguf onnx onnx_data ot tflite mlmodel npz pkl"
_OF_WEIGHTS = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
_TOKENIZER_FILE = re.compile(r"tokenizer\.json|vocab\.(json|txt)|.*\.(model|spm|tiktoken)")
_CONFIGS = ("config.json", ADAPTER_CONFIG, "tokenizer_config.json", "tokenizer.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Fetched:
    """One thing that a recipe names, and where it lies on this machine."""

    key: str
    """The keys that name it."""
    name: str
    revision: str | None
    """The commit of the Hub, if it is known; None for local files."""
    path: Path
    size_bytes: int
    local: bool
    """Local files, which were there and have not been fetched."""


def prefetch(loaded: Loaded) -> list[Fetched]:
    """Fetch the models, tokenizers and data sets of a recipe from the Hub into the caches of Hugging Face.

    Complete files are not fetched again. If the Hub cannot be reached, what the caches have is enough.

    Raises:
        RecipeError, DataError: a line for each model and each source that is found neither here nor on the Hub.
    """
    fetched: list[Fetched] = []
    problems: list[PtftError] = []
    models = _Models(loaded)
    for named in models:
        try:
            fetched.append(_model(named, loaded.base))
            models.lies_in(fetched[-1].path)
        except PtftError as error:
            problems.append(error)
    for key, source in recipe_sources(loaded.recipe):
        try:
            if source.source is None:
                fetched.append(_data(key, source, loaded.base))
        except PtftError as error:
            lines = str(error).splitlines() if source.path is not None else [str(error)]
            problems += [type(error)(f"{key}.{line}") for line in lines]
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    return fetched


def missing_offline(loaded: Loaded) -> list[str]:
    """What a node without internet would not find in the caches of Hugging Face: one line for each model and source.

    Directories and files are not checked: an earlier job may still write them.
    """
    missing: list[str] = []
    models = _Models(loaded)
    for named in models:
        try:
            place = Path(directory_or_hub_name(named.name, loaded.base, named.key))
        except RecipeError:
            continue
        if not place.is_dir():
            if (reason := _missing(named)) is not None:
                missing.append(f"{named.key}: {_described(named)}: {reason}")
                continue
            place = _cached(named) or place
        models.lies_in(place)
    for key, source in recipe_sources(loaded.recipe):
        if source.hub is not None and not Path(source.hub).is_dir() and not _has_data(source):
            missing.append(f"{key}.hub: {source.hub}: the data set is not in the cache {_data_cache()}")
    return missing


# --- models ----------------------------------------------------------------------------------------------------------


class _Models:
    """The models that a recipe names, each followed by the base if it is an adapter; a base only once."""

    def __init__(self, loaded: Loaded) -> None:
        self._pending, self._known = named_models(loaded.recipe), set[tuple[str, str | None]]()
        self._last: NamedModel | None = None

    def __iter__(self) -> Iterator[NamedModel]:
        while self._pending:
            self._last = self._pending.pop(0)
            self._known.add((self._last.name, self._last.revision))
            yield self._last

    def lies_in(self, folder: Path) -> None:
        """Where the last model lies, so that its base can be found. Raises PtftError."""
        assert self._last is not None
        base = _base_of(self._last, folder)
        if base is not None and (base.name, base.revision) not in self._known:
            self._pending.insert(0, base)


def needed_files(files: Iterable[str], *, weights: bool) -> list[str]:
    """The files of a repository that transformers reads: all but weights, and the weights in one format.

    Weights are safetensors, or else PyTorch's own format. Those in folders are in formats of other programs.
    """
    names = sorted(files)
    needed = [name for name in names if Path(name).suffix not in _OF_WEIGHTS]
    if weights:
        needed += [name for name in names if _SAFETENSORS.fullmatch(name)] or [
            name for name in names if _PICKLED.fullmatch(name)
        ]
    return needed


def _model(named: NamedModel, base: Path) -> Fetched:
    """Raises RecipeError if the model is neither a directory nor on the Hub, PtftError if the Hub cannot be reached."""
    place = Path(directory_or_hub_name(named.name, base, named.key))
    if place.is_dir():
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        return Fetched(named.key, named.name, None, place, size, local=True)
    folder = _download(named)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Fetched(named.key, named.name, folder.name, folder, size, local=False)


def _download(named: NamedModel) -> Path:
    """The directory in the cache with the files of a model."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    what = f"{named.key}: {_described(named)}"
    try:
        info = HfApi().model_info(named.name, revision=named.revision)
        files = needed_files([each.rfilename for each in info.siblings or ()], weights=named.weights)
        patterns = [name.replace("[", "[[]") for name in files]
        folder = Path(snapshot_download(named.name, revision=named.revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise RecipeError(
            f"{what}: neither a directory here nor a model on the Hub. Correct the name, or log in for a private "
            f"or gated one (hf auth login, or HF_TOKEN). {_first_line(error)}"
        ) from error
    except Exception as error:  # the library raises a dozen unrelated types if the Hub cannot be reached
        if _missing(named) is None and (cached := _cached(named)) is not None:
            return cached
        raise PtftError(
            f"{what}: cannot be fetched. Start again where the Hub can be reached, without HF_HUB_OFFLINE; complete "
            f"files are kept. {type(error).__name__}: {_first_line(error)}"
        ) from error
    if (reason := _missing(named)) is not None:
        raise RecipeError(f"{what}: {reason}, and neither has the Hub")
    return folder


def _base_of(named: NamedModel, folder: Path) -> NamedModel | None:
    """The base of an adapter directory."""
    if not is_adapter(folder):
        return None
    name, revision = adapter_base(folder)
    return NamedModel(f"{named.key} (base of the adapter)", name, revision, weights=True, tokenizer=False)


def _cached(named: NamedModel) -> Path | None:
    """The directory in the cache with the files of a model from the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in _CONFIGS:
            file = try_to_load_from_cache(named.name, name, revision=named.revision)
            if isinstance(file, str):
                return Path(file).parent
    except HFValidationError:
        return None  # the Hub has no such names
    return None


def _missing(named: NamedModel) -> str | None:
    """What the cache lacks of a model; None if it is complete."""
    if (folder := _cached(named)) is None:
        return "it is not in the cache of the Hub"
    names = {path.name for path in folder.iterdir() if path.exists()}  # a broken link is an incomplete file
    if named.tokenizer and not any(_TOKENIZER_FILE.fullmatch(name) for name in names):
        return "the cache has no tokenizer of it"
    if named.weights and not names & {"config.json", ADAPTER_CONFIG}:
        return "the cache has no config.json of it"
    if named.weights and not _has_weights(folder, names):
        return "the cache does not have all of its weights"
    return None


def _has_weights(folder: Path, names: Collection[str]) -> bool:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if index in names:
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            if set(shards) <= set(names):
                return True
    whole = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
    return any(name in names for name in whole)


def _described(named: NamedModel) -> str:
    return named.name if named.revision is None else f"{named.name} at revision {named.revision}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


# --- data ------------------------------------------------------------------------------------------------------------


def _data(key: str, source: Source, base: Path) -> Fetched:
    """Raises DataError."""
    if source.path is not None:
        files = source_files(source, base)
        size = sum(file.stat().st_size for file in files)
        return Fetched(f"{key}.path", source.path, None, files[0].parent, size, local=True)
    assert source.hub is not None
    if source.streaming:
        raise DataError(
            f"{key}.streaming: a stream is not fetched beforehand; set streaming: false, or run ptft prepare"
        )
    files = [Path(each["filename"]) for each in hub_dataset(source).cache_files]
    folder = files[0].parent if files else _data_cache()
    commit = folder.name if _COMMIT.fullmatch(folder.name) else source.revision
    size = sum(file.stat().st_size for file in files)
    return Fetched(f"{key}.hub", source.hub, commit, folder, size, local=Path(source.hub).is_dir())


def _data_cache() -> Path:
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE)


def _has_data(source: Source) -> bool:
    """Whether the cache of `datasets` has the split of a source, as it looks for it offline."""
    from datasets.naming import camelcase_to_snakecase

    *namespace, name = str(source.hub).split("/")
    folder = _data_cache() / "___".join([*namespace, camelcase_to_snakecase(name)])
    split = re.split(r"[\[+]", source.split or "train")[0]
    return any(folder.glob(f"{source.config or '*'}*/*/*/*-{split}*.arrow"))

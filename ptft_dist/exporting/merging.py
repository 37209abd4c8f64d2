"""Merges an adapter into its base, for `ptft merge`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ptft_dist.checkpoint.checkpoint import Checkpoints, read_checkpoint
from ptft_dist.errors import CheckpointError, RecipeError
from ptft_dist.exporting.checkpoints import load_run
from ptft_dist.networks.adapt.merging import check_mergeable, merge
from ptft_dist.networks.adapt.quantized import heads
from ptft_dist.networks.adapt.reading import AdapterFiles, read_adapter
from ptft_dist.networks.export import require_free
from ptft_dist.networks.frozen import files_identity, read_digests
from ptft_dist.networks.load import DTYPES
from ptft_dist.networks.names import is_adapter
from ptft_dist.networks.preview import preview_network
from ptft_dist.networks.rounding import little_kept
from ptft_dist.reporting.messages import say, warn
from ptft_dist.reporting.model_card import CARD, merged_card
from ptft_dist.run import libraries_restored


def merge_run(run: Path, out: Path, *, dtype: str | None) -> Path:
    """Merge the adapter of a run, or an adapter directory; see `api.merge`."""
    require_free(out)
    partial = out.with_name(f".{out.name}.partial")
    with libraries_restored():
        files = _adapter_of(run)
        check_mergeable(files)
        wanted = DTYPES[dtype] if dtype is not None else _own_dtype(files)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            merged = merge(files, wanted, partial)
            card = files.path / CARD
            text = card.read_text(encoding="utf-8") if card.is_file() else None
            (partial / CARD).write_text(merged_card(text, files.base, files.auto_class.__name__), encoding="utf-8")
            partial.rename(out)  # also replaces an empty directory
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    name = str(wanted).removeprefix("torch.")
    say(f"merged {files.path} into {files.base}: {out} ({name})")
    say(
        f"largest difference of logits: {merged.difference:.2e} of the largest logit (tolerance {merged.tolerance:.1e})"
    )
    if note := little_kept(merged.kept, wanted, "Merge with --dtype fp32 to keep all of it"):
        warn(note)
    return out


def _own_dtype(files: AdapterFiles) -> torch.dtype:
    """bf16 for a base that was quantized; otherwise the data type of the base's weights."""
    if files.quantize is not None:
        return torch.bfloat16
    own = files.base_config().dtype
    return own if isinstance(own, torch.dtype) and own in DTYPES.values() else torch.float32


def _adapter_of(run: Path) -> AdapterFiles:
    """The adapter of a run with the quantization of its recipe, or that of an adapter directory.

    Raises:
        RecipeError, CheckpointError: there is no adapter, or its base is missing or has changed since the training.
    """
    if is_adapter(run):
        return read_adapter(run)
    if not is_adapter(run / "model"):
        if any((folder / "config.json").is_file() for folder in (run, run / "model")):
            raise RecipeError(f"{run} contains a complete model and no adapter, so there is nothing to merge")
        raise CheckpointError(
            f"{run}: there is no adapter. A finished run writes it to {run / 'model'}; that of a checkpoint is written "
            "by: ptft export RUN --out DIR"
        )
    files, loaded = read_adapter(run / "model"), load_run(run)
    section = loaded.recipe.model.model_copy(update={"path": files.base, "revision": files.revision})
    paths = Checkpoints(run / "checkpoints").paths()
    saved = read_checkpoint(paths[-1]).manifest.get("base") if paths else None
    if saved is not None and files_identity(section, read_digests) != saved:
        raise CheckpointError(
            f"{files.base} has changed since {run} was trained on it. Restore its files, or merge {run / 'model'}, for "
            "which this is not checked"
        )
    files = replace(files, quantize=section.quantize, trust_remote_code=section.trust_remote_code)
    if section.quantize is None:
        return files
    whole = heads(preview_network(section, files.base_config(), files.auto_class))
    return replace(files, whole=tuple(whole))

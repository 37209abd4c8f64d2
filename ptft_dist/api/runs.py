"""The directories of runs: checkpoints, pages, exports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptft_dist.api.calls import check_dtype, hiding_secrets, quiet_imports
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from ptft_dist.checkpoint.listing import CheckpointInfo
    from ptft_dist.pages.comparison import Comparison


@hiding_secrets
def checkpoints(run_dir: str | Path) -> list[CheckpointInfo]:
    """The checkpoints of a run, sorted by step. Every byte is verified. Raises CheckpointError if there is none."""
    from ptft_dist.checkpoint.listing import list_checkpoints

    return list_checkpoints(Path(run_dir))


@hiding_secrets
def report(run_dir: str | Path, html: str | Path | None = None) -> Path:
    """Write one HTML page about a run, finished or not, and return its path. Imports no torch.

    Args:
        html: the page. Default: run_dir/report.html.

    Raises:
        RecipeError: this is no run directory.
        DataError: the run has no metrics yet, or a file is damaged.
        PtftError: the page cannot be written.
    """
    from ptft_dist.pages.page import write_report

    return write_report(Path(run_dir), None if html is None else Path(html))


@hiding_secrets
def compare(
    run_dirs: Sequence[str | Path], *, html: str | Path | None = None, json_file: str | Path | None = None
) -> Comparison:
    """Compare runs, finished or not: metrics, recipes, environments, and evaluations. Imports no torch.

    Args:
        run_dirs: two run directories or more; the first one is the baseline of differences.
        html: one page with tables and the curves of all runs.
        json_file: a file for `Comparison.values()`.

    Raises:
        RecipeError: fewer than two runs, one run twice, or a directory that is no run.
        DataError: a run has no metrics yet, or a file is damaged.
        PtftError: a file cannot be written.
    """
    from ptft_dist.pages.comparison import Comparison
    from ptft_dist.pages.page import write_comparison
    from ptft_dist.pages.read import read_runs
    from ptft_dist.reporting.output import write_text

    comparison = Comparison(read_runs([Path(each) for each in run_dirs]))
    if json_file is not None:
        write_text(Path(json_file), json.dumps(comparison.values(), indent=1) + "\n")
    if html is not None:
        write_comparison(comparison, Path(html))
    return comparison


@hiding_secrets
def export(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    license_id: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Export the weights of a checkpoint as a model directory, or as an adapter directory if the run trains an adapter.

    The directory also has the tokenizer and a model card (README.md). Needs the run directory, and the base of a
    pretrained network, but no data.

    Args:
        run: a run directory.
        out: the target; must not exist, or be empty.
        step: the update of the checkpoint. Default: the newest one.
        dtype: fp32, bf16 or fp16, for the weights. Default: as the recipe's `save.dtype` says.
        license_id: an identifier of the Hub for the model card, such as apache-2.0.
        push: upload the directory to this repository of the Hub, with the token in HF_TOKEN or of `hf auth login`.
        private: the repository is private, if it is created.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or the base has changed.
        RecipeError: the base is missing, `out` is not empty, or there is no such data type.
        PtftError: the upload failed.
    """
    if private and push is None:
        raise RecipeError("private: applies to a repository of the Hub. Name it with `push`")
    check_dtype(dtype)
    quiet_imports()
    from ptft_dist.exporting.checkpoints import export_run
    from ptft_dist.exporting.checkpoints import push as upload
    from ptft_dist.reporting.messages import messages

    with messages(0):
        folder = export_run(Path(run), Path(out).absolute(), step=step, dtype=dtype, license_id=license_id)
        if push is not None:
            upload(folder, push, private=private)
    return folder

"""Exports the weights of a checkpoint, for `ptft export`: a model directory or adapter directory with a model card.

The network of a run is built again on one process, as the run has built it, and gets the weights of the checkpoint. Two
files of the run directory stand in for the training data, which are not needed: `tokenizer/` has the tokenizer, and
data_report.json the survey of the training rows, such as the labels. The base of a pretrained network must still exist.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, read_checkpoint, verify
from ptft_dist.config.load import Loaded, read_resolved
from ptft_dist.data.report import Report
from ptft_dist.engine import SavedState
from ptft_dist.errors import CheckpointError, PtftError, RecipeError
from ptft_dist.networks.export import export, require_free
from ptft_dist.networks.frozen import read_digests
from ptft_dist.networks.load import DTYPES
from ptft_dist.networks.names import adapter_base, is_adapter
from ptft_dist.networks.rounding import little_kept
from ptft_dist.reporting.messages import say, warn
from ptft_dist.reporting.model_card import model_card
from ptft_dist.run import libraries_restored
from ptft_dist.session.trained_network import TrainedNetwork
from ptft_dist.tasks.registry import recipe_class


class SavedRun:
    """The network of a run, built from its run directory in one process, without its data."""

    def __init__(self, run_dir: Path, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError if a file of the run is missing, RecipeError if its base is."""
        self.run_dir, self.checkpoint = run_dir, checkpoint
        self.loaded = load_run(run_dir)
        try:
            report = Report.from_dict(json.loads((run_dir / "data_report.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{run_dir / 'data_report.json'} cannot be read: {error}. Restore it") from None
        if not (run_dir / "tokenizer").is_dir():
            raise CheckpointError(f"{run_dir} has no tokenizer directory; restore it")
        steps = partial(checkpoint.entry, "total_steps", int)
        self.trained = TrainedNetwork(self.loaded, run_dir / "tokenizer", report.survey, "single", steps)

    def load(self) -> SavedState:
        """Build the network and load the weights of the checkpoint.

        Raises:
            CheckpointError: the base has changed since the run, or the checkpoint belongs to another recipe.
        """
        state, section = SavedState(), self.trained.section
        saved = self.checkpoint.manifest.get("base")
        # The cache of the run, with the hashes of files, may be on another machine.
        if saved is not None and self.trained.base_identity(read_digests) != saved:
            raise CheckpointError(
                f"{section.path} has changed since {self.run_dir} was trained on it. Restore the files of the base"
            )
        if section.adapt.lora is not None and section.adapt.lora.init == "eva":
            raise RecipeError(
                f"{self.run_dir}: init: eva computes the ranks from training rows, so a checkpoint cannot be exported "
                "without them. Resume the run to its end; it then writes the adapter to its model directory"
            )
        self.trained.build(state)
        state.load(self.trained.model, self.checkpoint.path, self.checkpoint.entry("kind", str))
        return state


def load_run(run_dir: Path) -> Loaded:
    """The complete recipe of a run. Raises CheckpointError if the directory has none."""
    file = run_dir / "resolved.yaml"
    if not file.is_file():
        raise CheckpointError(f"{run_dir} is no run directory: it has no resolved.yaml")
    return read_resolved(file, recipe_class())


def export_run(run_dir: Path, out: Path, *, step: int | None, dtype: str | None, license_id: str | None) -> Path:
    """Export the weights of one checkpoint; see `api.export`."""
    require_free(out)
    checkpoint = _choose(run_dir, step)
    with libraries_restored():
        run = SavedRun(run_dir, checkpoint)
        state = run.load()
        trained = run.trained
        card = model_card(run.loaded, run_dir, checkpoint.step, **trained.card_facts, license_id=license_id)
        out.parent.mkdir(parents=True, exist_ok=True)
        wanted = trained.export_dtype if dtype is None else DTYPES[dtype]
        kept = export(state, replace(trained.content(card), dtype=wanted), out)
    if note := little_kept(kept, wanted, "Export with --dtype fp32 to keep all of it"):
        warn(note)
    say(f"exported update {checkpoint.step} of {run_dir} to {out}")
    return out


def _choose(run_dir: Path, step: int | None) -> Checkpoint:
    """The newest checkpoint, or that of update `step`, with every byte verified. Raises CheckpointError."""
    paths = Checkpoints(run_dir / "checkpoints").paths()
    steps = [int(path.name[5:]) for path in paths]
    if not paths:
        raise CheckpointError(
            f"{run_dir / 'checkpoints'} contains no checkpoint. Give the run_dir of a run that saved one"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"{run_dir} has no checkpoint of update {step}. It has: {', '.join(map(str, steps))}")
    path = paths[-1] if step is None else paths[steps.index(step)]
    checkpoint = read_checkpoint(path)
    if problems := verify(checkpoint):
        others = ", ".join(str(each) for each in steps if each != checkpoint.step) or "none"
        raise CheckpointError(
            f"damaged checkpoint: {'; '.join(problems)}. Choose another one with --step; others: {others}"
        )
    return checkpoint


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a directory to the Hub, with the token of the environment; return its address.

    Raises:
        PtftError: the upload failed. The directory stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if is_adapter(folder) and Path(base := adapter_base(folder)[0]).is_absolute():
        warn(
            f"adapter_config.json names the base by a directory of this machine, {base}; others need its Hub name there"
        )
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message="Upload with ptft export")
    except HFValidationError as error:
        raise RecipeError(f"--push {repo_id}: {error}") from None
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:
        raise PtftError(
            f"--push {repo_id}: the upload failed, {folder} is complete: {error}\nSet HF_TOKEN to a token that may "
            f"write to this repository, or upload the directory later: hf upload {repo_id} {folder}"
        ) from None
    return str(url)

"""Resuming a run: chooses a checkpoint, and checks that it fits the recipe, the backend and the processes."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, Ranks, read_checkpoint, verify
from ptft_dist.checkpoint.identity import NEVER_ACCEPTED, all_keys, differences
from ptft_dist.errors import CheckpointError, CheckpointVersionError, RecipeError

FROM_WEIGHTS = "model.path: DIRECTORY, which ptft export RUN --out DIRECTORY writes"


def after_requeue(checkpoints: Checkpoints, how: str, job: str | None) -> str:
    """`auto` for a requeued job that has begun the run, although its command line says `never` or a path; else `how`.

    If the job has not saved a checkpoint yet, it resumes from the path.

    Args:
        job: the id of a restarted job; None for a first start.
    """
    try:
        begun = json.loads(_marker(checkpoints).read_text())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return how
    return "auto" if job is not None and job == begun else how


def _marker(checkpoints: Checkpoints) -> Path:
    return checkpoints.folder.parent / ".begun.json"


def group_entries(groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What a manifest says about the optimizer's parameter groups: their sizes, and a hash of the names in them."""
    digest = hashlib.sha256(json.dumps([list(names) for names in groups]).encode()).hexdigest()
    return {"groups": [len(names) for names in groups], "group_names": digest}


class Resume:
    """Chooses a checkpoint by `--resume auto | never | PATH` and `--accept KEY`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        how: str,
        accept: Sequence[str],
        identity: dict[str, Any],
        why_not_loadable: Callable[[str, int], str | None],
        may_change: Callable[[str], bool] = lambda _key: False,
        first: str | None = None,
    ) -> None:
        """Args:
        how: `auto`, `never` or the path of a checkpoint.
        accept: keys that may differ from the checkpoint.
        identity: the identity of this run; a checkpoint must have the same.
        why_not_loadable: (kind, ranks) -> why this run cannot load state that they saved; None if it can.
        may_change: key -> whether it is never compared.
        first: `how` of the command line; see `after_requeue`.
        """
        self.checkpoints, self.how, self.accept = checkpoints, how, accept
        self.identity, self.why_not_loadable, self.first = identity, why_not_loadable, first or how
        self.may_change = may_change

    @property
    def marker(self) -> Path:
        """The file with the id of the job that began this run last."""
        return _marker(self.checkpoints)

    def precheck(self) -> None:
        """Check the newest checkpoint before any process group exists, without hashing files.

        Raises:
            CheckpointError, RecipeError: see `check`.
        """
        if self.how == "never":
            self._check_accept({})
            return
        if self.how != "auto":
            self.check(read_checkpoint(Path(self.how)))
            return
        for path in reversed(self.checkpoints.paths()):
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointVersionError:
                raise
            except CheckpointError:
                continue  # `choose` reports the damage, after it has verified the hashes
            self.check(checkpoint)
            return
        if self.first not in ("auto", "never"):
            self.check(read_checkpoint(Path(self.first)))
        else:
            self._check_accept({})

    def choose(self, ranks: Ranks, tell: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to resume from, every byte verified; None to start from zero. The same on every rank.

        Does not change files; see `begin`.
        """
        chosen = self.checkpoints.newest_good(ranks, tell) if self.how == "auto" else None
        path = self.how if self.how != "auto" else self.first
        if chosen is None and path not in ("auto", "never"):
            chosen = read_checkpoint(Path(path))
            if problems := verify(chosen, ranks):
                raise CheckpointError("damaged checkpoint: " + "; ".join(problems))
        if chosen is not None:
            self.check(chosen)
        return chosen

    def check_groups(self, checkpoint: Checkpoint, groups: Sequence[Sequence[str]]) -> None:
        """Raises CheckpointError if the optimizer's parameter groups are not those of the checkpoint.

        groups: the names of the parameters in each group. Some backends store the state without names, in this order.
        """
        now = group_entries(groups)
        saved = {key: checkpoint.manifest.get(key, value) for key, value in now.items()}  # absent in older checkpoints
        if saved != now:
            sizes = f"groups of {now['groups']}" if saved["groups"] != now["groups"] else "other parameters in them"
            raise CheckpointError(
                f"{checkpoint.path} has the optimizer's state for parameter groups of {saved['groups']} parameters, "
                f"but this recipe has {sizes}. A weight decay of 0 and optim.groups change them: restore the old "
                f"values, or start a new run from the weights: {FROM_WEIGHTS}"
            )

    def check_base(self, checkpoint: Checkpoint, base: str | None) -> None:
        """Raises CheckpointError if the checkpoint was trained on another base model.

        base: hash of the files of the base model; None if none of its weights are frozen.
        """
        saved = checkpoint.manifest.get("base")
        if base is not None and saved is not None and base != saved:
            raise CheckpointError(
                f"{checkpoint.path} was trained on another base model: the files of model.path have changed. Restore "
                "them, or choose another run_dir"
            )

    def begin(self, chosen: Checkpoint | None, tell: Callable[[str], None], job: str | None) -> None:
        """Change the run directory after all checks have passed. Called on rank 0.

        Record the job, remove the remains of interrupted saves, and set aside checkpoints after the chosen one.
        """
        self.marker.write_text(json.dumps({"job": job}))
        self.checkpoints.clean(tell)
        own = chosen is not None and self.checkpoints.own(chosen)
        self.checkpoints.set_aside_after(chosen.step if chosen is not None and own else -1, tell)

    def check(self, checkpoint: Checkpoint) -> None:
        """Check that a checkpoint belongs to this run.

        Raises:
            CheckpointError: a key differs that --accept does not name, or these processes cannot load the state.
            RecipeError: --accept names an unknown key.
        """
        saved = checkpoint.entry("identity", dict)
        self._check_accept(saved)
        different = differences(saved, self.identity)
        for key in (key for key in NEVER_ACCEPTED if key in different):
            raise CheckpointError(
                f"{checkpoint.path} has the state of another optimizer: {key}: {different[key]}. Restore the old "
                f"value, or start a new run from the weights: {FROM_WEIGHTS}"
            )
        refused = {key: change for key, change in different.items() if key not in self.accept}
        if refused:
            lines = "".join(f"\n  {key}: {change}" for key, change in refused.items())
            options = " ".join(f"--accept {shlex.quote(key)}" for key in refused)
            raise CheckpointError(
                f"{checkpoint.path} was made with another recipe or other data:{lines}\n"
                "Restore the old values, choose another run_dir, start over with --resume never, or accept the "
                f"changes: {options}"
            )
        reason = self.why_not_loadable(checkpoint.entry("kind", str), checkpoint.entry("world_size", int))
        if reason is not None:
            raise CheckpointError(f"{checkpoint.path} {reason}")

    def _check_accept(self, saved: dict[str, Any]) -> None:
        """Raise RecipeError for an --accept key that does not exist, or that is never compared.

        A key without a difference is valid: a requeued job repeats its command line, and its newest checkpoint already
        has the accepted value.
        """
        keys = all_keys(self.identity) | (all_keys(saved) if saved else set())
        for name in self.accept:
            if name in keys:
                continue
            if self.may_change(name):
                raise RecipeError(f"--accept {name}: not needed, this key may always change at a resume; remove it")
            different = list(differences(saved, self.identity)) if saved else []
            near = get_close_matches(name, keys, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            keys_that_differ = f" Keys that differ: {', '.join(different)}" if different else ""
            raise RecipeError(f"--accept {name}: there is no such key{hint}{keys_that_differ}")

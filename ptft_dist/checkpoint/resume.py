"""Where a run goes on: which checkpoint, and whether it belongs to this recipe, this engine and these processes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, Ranks, read_checkpoint, verify
from ptft_dist.checkpoint.identity import all_keys, differences
from ptft_dist.errors import CheckpointError, CheckpointVersionError, RecipeError


class Resume:
    """The choice of a checkpoint under `--resume auto | never | PATH` and `--accept KEY`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        how: str,
        accept: Sequence[str],
        identity: dict[str, Any],
        why_not_loadable: Callable[[str, int], str | None],
        may_change: Callable[[str], bool] = lambda _key: False,
    ) -> None:
        """identity: what the checkpoint must have in common with this run. why_not_loadable: from the engine; the
        reason why this run cannot load the state that (kind, ranks) saved, or None. may_change: whether a key is never
        compared."""
        self.checkpoints, self.how, self.accept = checkpoints, how, accept
        self.identity, self.why_not_loadable, self.first = identity, why_not_loadable, how
        self.may_change = may_change

    def after_requeue(self, job: str | None) -> None:
        """`never` and a path belong to the first start of a job. Where a scheduler starts it again, go on from what the
        job has saved; from the path, if it has saved nothing yet.

        job: the id of a job that is started again; None for a first start.
        """
        try:
            begun = json.loads(self.marker.read_text())["job"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if job is not None and job == begun and self.how != "auto":
            self.first, self.how = self.how, "auto"

    @property
    def marker(self) -> Path:
        """The file that says which job began this run last."""
        return self.checkpoints.folder.parent / ".begun.json"

    def look(self) -> None:
        """Refuse what is certainly wrong before any process group forms; no file is hashed yet."""
        self._check_accept({})
        if self.how == "never":
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
                continue  # `choose` reports the damage, with what the hashes find
            self.check(checkpoint)
            return
        if self.first not in ("auto", "never"):
            self.check(read_checkpoint(Path(self.first)))

    def choose(self, ranks: Ranks, tell: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to go on from, every byte verified; None to start from zero. Same answer on every rank.

        Changes nothing on the disk: see `begin`.
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

    def check_base(self, checkpoint: Checkpoint, base: str | None) -> None:
        """Raises CheckpointError if the frozen weights are not those that the checkpoint's trained ones belong to.

        base: identifies the files of the pretrained network; None if none of its weights are frozen.
        """
        saved = checkpoint.manifest.get("base")
        if base is not None and saved is not None and base != saved:
            raise CheckpointError(
                f"{checkpoint.path} was trained on another base network: the files of model.path have changed. Bring "
                "them back, or choose another run_dir"
            )

    def begin(self, chosen: Checkpoint | None, tell: Callable[[str], None], job: str | None) -> None:
        """Called on rank 0 when nothing can refuse this start any more: remove what an interrupted save left behind,
        set aside every checkpoint that does not belong to this run now, and note the job."""
        self.marker.write_text(json.dumps({"job": job}))
        self.checkpoints.clean(tell)
        inside = chosen is not None and chosen.path.parent.resolve() == self.checkpoints.folder.resolve()
        self.checkpoints.set_aside_after(chosen.step if chosen is not None and inside else -1, tell)

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a checkpoint that does not belong to this run.

        Raises:
            CheckpointError: a key differs that --accept does not name, or the state is of other processes.
            RecipeError: --accept names what is no key.
        """
        saved = checkpoint.fact("identity", dict)
        self._check_accept(saved)
        different = differences(saved, self.identity)
        refused = {key: what for key, what in different.items() if key not in self.accept}
        if refused:
            lines = "".join(f"\n  {key}: {what}" for key, what in refused.items())
            options = " ".join(f"--accept {shlex.quote(key)}" for key in refused)
            raise CheckpointError(
                f"{checkpoint.path} was made with another recipe or other data:{lines}\n"
                f"Restore the old values, choose another run_dir, or accept the changes: {options}"
            )
        reason = self.why_not_loadable(checkpoint.fact("kind", str), checkpoint.fact("world_size", int))
        if reason is not None:
            raise CheckpointError(f"{checkpoint.path} {reason}")

    def _check_accept(self, saved: dict[str, Any]) -> None:
        """Raise RecipeError at the first --accept that no difference can ever have, with the keys that it may mean.

        A key without a difference is right: a requeued job repeats its command line, and its newest checkpoint already
        has the accepted value.
        """
        keys = all_keys(self.identity) | (all_keys(saved) if saved else set())
        for name in self.accept:
            if name in keys:
                continue
            if self.may_change(name):
                raise RecipeError(f"--accept {name}: this key may always change between the parts of a run; remove it")
            different = list(differences(saved, self.identity)) if saved else []
            near = get_close_matches(name, keys, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            what = f" What differs: {', '.join(different)}" if different else ""
            raise RecipeError(f"--accept {name}: there is no such key{hint}{what}")

"""Where a run goes on: which checkpoint, and whether it belongs to this recipe, this engine and these processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, Ranks, read_checkpoint, verify
from ptft_dist.checkpoint.identity import differences
from ptft_dist.errors import CheckpointError


class Resume:
    """The choice of a checkpoint under `--resume auto | never | PATH` and `--accept KEY`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        how: str,
        accept: Sequence[str],
        identity: dict[str, Any],
        why_not_loadable: Callable[[str, int], str | None],
    ) -> None:
        """identity: what the checkpoint must have in common with this run. why_not_loadable: from the engine; the
        reason why this run cannot load the state that (kind, ranks) saved, or None."""
        self.checkpoints, self.how, self.accept = checkpoints, how, accept
        self.identity, self.why_not_loadable = identity, why_not_loadable

    def look(self) -> None:
        """Refuse what is certainly wrong before any process group forms; no file is hashed yet."""
        if self.how == "never":
            return
        if self.how != "auto":
            self.check(read_checkpoint(Path(self.how)))
            return
        for path in reversed(self.checkpoints.paths()):
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointError:
                continue  # `choose` tells of it, with the damage that hashes find
            self.check(checkpoint)
            return

    def choose(self, ranks: Ranks, tell: Callable[[str], None]) -> Checkpoint | None:
        """The checkpoint to go on from, every byte verified; None to start from zero. Same answer on every rank."""
        if self.how == "never":
            chosen = None
        elif self.how == "auto":
            chosen = self.checkpoints.newest_good(ranks, tell)
        else:
            chosen = read_checkpoint(Path(self.how))
            problems = verify(chosen, ranks)
            if problems:
                raise CheckpointError("damaged checkpoint: " + "; ".join(problems))
        if chosen is not None:
            self.check(chosen)
        if ranks.rank == 0:
            self.checkpoints.clean(tell)
            self.checkpoints.set_aside_after(-1 if chosen is None else chosen.step, tell)
        ranks.gather_objects(None)
        return chosen

    def check(self, checkpoint: Checkpoint) -> None:
        manifest = checkpoint.manifest
        different = differences(manifest["identity"], self.identity)
        refused = {key: what for key, what in different.items() if key not in self.accept}
        if refused:
            lines = "".join(f"\n  {key}: {what}" for key, what in refused.items())
            raise CheckpointError(
                f"{checkpoint.path} was made with another recipe:{lines}\n"
                "Go back to those values, choose another run_dir, or accept a change with --accept KEY."
            )
        reason = self.why_not_loadable(manifest["kind"], manifest["world_size"])
        if reason is not None:
            raise CheckpointError(f"{checkpoint.path} {reason}")

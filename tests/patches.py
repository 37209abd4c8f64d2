"""Changes that tests make to the program inside its own processes: to slow it, stop it, break it or watch it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any


def witness() -> None:
    """Write what the engine really is, as seen from inside this rank, to witness-RANK.json."""
    import torch.distributed as dist

    from ptft_dist.engine import Engine

    prepare = Engine.prepare

    def watched(self: Engine, *args: Any) -> None:
        prepare(self, *args)
        optimizer = self.backend.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.kind == "zero3":  # the optimizer of stage 3 shows whole parameters; what a rank holds is in ds_tensor
            parameters = [p.ds_tensor for p in self.model.parameters()]
        elif self.kind == "fsdp2":
            parameters = [p.to_local() for p in parameters]
        facts = {
            "module": type(self.module).__name__,
            "optimizer": type(optimizer).__name__,
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "own_elements": sum(p.numel() for p in parameters),
            "all_elements": self.parameter_count,
        }
        Path(f"witness-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))

    Engine.prepare = watched  # type: ignore[method-assign]


def slow_updates(seconds: str) -> None:
    """Sleep after each update, so that a test can meet it."""
    from ptft_dist.trainer import Trainer

    update = Trainer.update

    def slow(self: Trainer, group: Any) -> Any:
        report = update(self, group)
        time.sleep(float(seconds))
        return report

    Trainer.update = slow  # type: ignore[method-assign]


def hang_in_save(step: str) -> None:
    """Never finish the checkpoint of this step: its files are there, its manifest is not."""
    from ptft_dist import checkpoint

    seal = checkpoint._seal

    def hang(path: Path) -> dict[str, Any]:
        if f"step-{int(step):08d}" in str(path):
            time.sleep(600)
        return seal(path)

    checkpoint._seal = hang

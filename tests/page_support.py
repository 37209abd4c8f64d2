"""Run directories for the tests of reports, written by hand: no training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPE = "task: clm\noptim: {lr: LR}  # the rate\n"


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path, lr: float = 0.1, losses: Sequence[float] = (3.0, 2.0, 2.5), **result: Any) -> Path:
    """A run of 2 updates per evaluation: training loss = eval loss + 1, 10 tokens per update, accuracy = 1 / loss.

    losses: eval/loss at update 0, 2, 4, ... result: entries of result.json; status=None: there is none.
    """
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i, loss in enumerate(losses):
        if i:
            rows += [{"step": s, "loss": loss + 1, "lr": lr, "tokens": 10 * s} for s in (2 * i - 1, 2 * i)]
        rows.append({"step": 2 * i, "eval/loss": loss, "eval/accuracy": 1 / loss, "eval/kl": 0.5, "eval/time_s": 1.0})
    write_json_lines(folder / "metrics.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE.replace("LR", str(lr)))
    (folder / "resolved.yaml").write_text(f"task: clm\noptim:\n  lr: {lr}\neval:\n  goal:\nrun_dir: {folder}\n")
    environment = {"device": "CPU", "world_size": 1, "packages": {"torch": "2"}, "command": ["ptft", "train", "a b"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    last = {key: value for key, value in rows[-1].items() if key.startswith("eval/") and key != "eval/time_s"}
    values = {"status": "finished", "reason": "all updates done", "steps": rows[-1]["step"], "wall_s": 61.0}
    values |= {"metrics": last, "metrics_step": rows[-1]["step"], "tokens_per_s": 100.0, **result}
    if values["status"] is not None:
        (folder / "result.json").write_text(json.dumps(values))
    return folder


def write_evaluation(run: Path, losses: Sequence[float], judged: str = "same", rows_file: bool = True) -> None:
    """The files of `ptft evaluate` in a run: losses of examples with one token each."""
    loss = sum(losses) / len(losses)
    values = {
        "model": "m",
        "recipe": "r",
        "metrics": {"eval/loss": loss},
        "rows": len(losses) + 1,  # an example has two
        "examples": len(losses),
    }
    (run / "evaluation.json").write_text(json.dumps({**values, "judged": judged, "details": {}}))
    if rows_file:
        rows = [{"row": i, "id": f"{judged}-{i}", "values": {"loss": [x, 1]}} for i, x in enumerate(losses)]
        write_json_lines(run / "evaluation.rows.jsonl", rows)

"""The task of docs/guides/own-task.md: its files, in a package of their own, train as the page says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from docs_commands import blocks
from preloaded_ranks import preloaded_ptft
from support import ROOT, environment

SCRIPT = """
import sys
import ptft_dist.tasks
from ptft_dist.tasks.registry import TASKS, TaskSpec, recipe_class

ptft_dist.tasks.__path__.append({folder!r})
from ptft_dist.tasks.clm_tail.settings import ClmTailSettings

TASKS.update({{ {line} }})
recipe_class.cache_clear()
from ptft_dist.cli import main

sys.argv = {words!r}
main()
"""


def test_the_task_of_the_guide_trains(tmp_path: Path, cache: Path) -> None:
    page = blocks(ROOT / "docs/guides/own-task.md")
    files = {block.mark.removeprefix("file "): block.text for block in page if block.mark.startswith("file ")}
    (command,) = (block.text.split() for block in page if block.kind == "text" and block.text.startswith("ptft"))
    folder = tmp_path / "tasks"
    (folder / "clm_tail").mkdir(parents=True)
    (folder / "clm_tail/__init__.py").touch()
    for name in ("clm_tail/settings.py", "clm_tail/task.py"):
        (folder / name).write_text(files[name])
    fewer = ["train.max_steps=2", "data.train.0.limit=40", "data.validation=0.2", "eval.max_rows=8"]
    fewer += ["batch.global_size=8", "log.report=false"]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(folder), line=files["line.py"].strip(), words=[*command, *fewer]))
    env = environment({"PTFT_CACHE": str(cache)})
    words = [str(preloaded_ptft() / "python"), str(script)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/clm/metrics.jsonl").read_text().splitlines()]
    assert [row["loss_tokens"] for row in rows if "loss" in row] == [8 * 16, 8 * 16]  # rows x clm_tail.last
    assert json.loads((tmp_path / "runs/clm/result.json").read_text())["status"] == "finished"

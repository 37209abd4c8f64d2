"""Real English and Chinese text from the directory PTFT_TEST_DATA."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support import eval_rows, start, train_rows, write_recipe

DATA = os.environ.get("PTFT_TEST_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="PTFT_TEST_DATA does not name a folder of real text")

SOURCES: dict[str, tuple[dict[str, Any], int]] = {
    # source, documents in it (counted with other tools: wc -l, ls, grep -c)
    "web_pages": ({"path": f"{DATA}/text/en_c4_demo.jsonl"}, 160),
    "poems": ({"path": f"{DATA}/text/zh_tang_poems.jsonl"}, 1000),
    "books": ({"path": f"{DATA}/text/en_gutenberg/*.txt", "document": "paragraph"}, 0),
    "novel": ({"path": f"{DATA}/text/zh_sanguoyanyi.txt", "document": "line"}, 1566),
}


def paragraphs(pattern: str) -> int:
    """Blocks between empty lines, counted naively."""
    blocks, inside = 0, False
    for path in sorted(Path(pattern).parent.glob(Path(pattern).name)):
        inside = False
        for line in path.read_text().splitlines():
            if line.strip() and not inside:
                blocks += 1
            inside = bool(line.strip())
    return blocks


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_learns_from_it(name: str, tmp_path: Path) -> None:
    source, documents = SOURCES[name]
    data = {"train": [source], "validation": 0.05, "max_length": 64}
    recipe = write_recipe(
        tmp_path,
        Path("unused"),
        data=data,
        clm={"packing": True},
        tokenizer={"train": {"vocab_size": 1024, "max_megabytes": 0.3}},
        optim={"lr": 0.01, "warmup": 3, "max_grad_norm": 1.0},
        train={"max_steps": 40},
        eval={"every": 20, "at_start": True, "max_rows": 30},
        save={"every": None},
    )
    run = start("train", str(recipe), cwd=tmp_path, cache=tmp_path / "cache")
    assert run.wait() == 0, run.stderr
    losses = [row["eval/loss"] for row in eval_rows(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]
    assert len(train_rows(tmp_path / "run")) == 40
    (path,) = (tmp_path / "cache").glob("stores/*/report.json")
    report = json.loads(path.read_text())
    expected = documents or paragraphs(source["path"])
    empty = report["dropped"].get("without text", (0, []))[0]
    assert report["train"]["examples"] + report["validation"]["examples"] + empty == expected == report["read"]

"""The speed of each cleaning step on English and Chinese text, in MB of UTF-8 per CPU second.

    PTFT_TEST_DATA=FOLDER python benchmarks/cleaning_steps.py [--repeats 5]

English: web pages (C4). Chinese: answers of Alpaca joined to texts of about 2,500 bytes. The steps take turns; the
fastest of the repeats counts. `chain` is the time of all steps together on each text, whether or not one drops it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from ptft_dist.config.cleaning import StepSection
from ptft_dist.data.cleaning.registry import text_step

STEPS: dict[str, dict[str, Any]] = {
    "unicode": {},
    "whitespace": {},
    "control": {},
    "language": {"keep": ["en", "zh"]},
    "quality": {},
    "pii": {},
    "repetition": {},
    "decontaminate": {
        "files": ["sft/gsm8k_dev.jsonl", "pref/alpaca_eval_test.jsonl", "sft/crosswoz_multiturn_zh.jsonl"]
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    data = Path(os.environ["PTFT_TEST_DATA"])
    steps = {name: text_step(StepSection.model_validate({name: s}).settings, data) for name, s in STEPS.items()}
    texts = {"English": column(data / "text/en_c4_demo.jsonl", "text"), "Chinese": chinese(data)}
    best = {(name, language): float("inf") for name in steps for language in texts}
    for _ in range(options.repeats):
        for name, step in steps.items():
            for language, rows in texts.items():
                start = time.process_time()
                for row in rows:
                    step(row)
                best[name, language] = min(best[name, language], time.process_time() - start)
    for language in texts:
        best["chain", language] = sum(best[name, language] for name in steps)
    sizes = {language: sum(len(row.encode()) for row in rows) for language, rows in texts.items()}
    for language, rows in texts.items():
        print(f"{language}: {len(rows)} texts of {sizes[language] / len(rows):,.0f} bytes")
    print("\n| step | " + " | ".join(f"{language}, MB/s" for language in texts) + " |\n|---|---|---|")
    for name in (*steps, "chain"):
        print(f"| {name} | " + " | ".join(f"{sizes[each] / best[name, each] / 1e6:.1f}" for each in texts) + " |")


def column(file: Path, name: str) -> list[str]:
    return [json.loads(line)[name] for line in file.read_text(encoding="utf-8").splitlines()]


def chinese(data: Path) -> list[str]:
    rows = column(data / "sft/alpaca_zh.jsonl", "output")
    return ["\n".join(rows[i : i + 5]) for i in range(0, len(rows), 5)]


if __name__ == "__main__":
    main()

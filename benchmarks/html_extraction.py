"""The main text of HTML pages: words in common with the article, and speed, beside other extractors.

    PTFT_TEST_DATA=FOLDER python benchmarks/html_extraction.py [--file pages.jsonl] [--repeats 3]

Each row of the file has `html` and `article_text`. For each page, F1 of the words of the extracted text against those
of the article, as multisets; the table has means over pages. resiliparse is compared where it is installed. The
extractors take turns, and the fastest of the repeats counts.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import trafilatura

from ptft_dist.config.cleaning import HtmlStep
from ptft_dist.data.cleaning.html import Html

_UNSEEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    file = options.file or Path(os.environ["PTFT_TEST_DATA"]) / "dirty/html_pages.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    size = sum(len(row["html"].encode()) for row in rows)
    sides = extractors()
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(options.repeats):
        for name, extract in sides.items():
            start = time.perf_counter()
            for row in rows:
                extract(row["html"])
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{len(rows)} pages, {size / 1e6:.2f} MB\n")
    print("| extractor | F1 | precision | recall | pages/s | MB/s |\n|---|---|---|---|---|---|")
    for name, extract in sides.items():
        scores = [score(extract(row["html"]), row["article_text"]) for row in rows]
        means = " | ".join(f"{sum(column) / len(rows):.3f}" for column in zip(*scores, strict=True))
        print(f"| {name} | {means} | {len(rows) / best[name]:.0f} | {size / best[name] / 1e6:.1f} |")


def extractors() -> dict[str, Callable[[str], str]]:
    """The text that each extractor finds in a page; empty if it finds none."""
    ours = Html(HtmlStep())
    sides: dict[str, Callable[[str], str]] = {
        "step html (trafilatura, precision)": lambda page: "" if (made := ours(page)).dropped else made.text,
        "trafilatura, balanced": lambda page: trafilatura.extract(page, include_comments=False) or "",
        "trafilatura, recall": lambda page: trafilatura.extract(page, include_comments=False, favor_recall=True) or "",
        "tag stripping": stripped,
    }
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        return sides
    settings = {"alt_texts": False, "comments": False, "preserve_formatting": True, "list_bullets": False}
    sides["resiliparse, main content"] = lambda page: extract_plain_text(page, main_content=True, **settings)
    return sides


def stripped(page: str) -> str:
    """The page without scripts, styles, comments and tags."""
    return html.unescape(re.sub(r"<[^>]+>", " ", _UNSEEN.sub(" ", page)))


def score(found: str, article: str) -> tuple[float, float, float]:
    """F1, precision and recall of words."""
    ours, theirs = (Counter(re.findall(r"\w+", text.casefold())) for text in (found, article))
    same = sum((ours & theirs).values())
    precision, recall = same / max(1, ours.total()), same / max(1, theirs.total())
    return 2 * precision * recall / max(1e-9, precision + recall), precision, recall


if __name__ == "__main__":
    main()

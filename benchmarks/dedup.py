"""Near-deduplication of planted duplicates: ptft beside datatrove and datasketch, against brute force.

    PTFT_TEST_DATA=FOLDER python benchmarks/dedup.py [--documents 100000] [--datatrove PYTHON] [--datasketch PYTHON]

Documents of about 150 words are runs of 4 to 12 words from books (FOLDER/text/en_gutenberg) in random order. A fifth
are copies of earlier ones with 0, 1, 2, 4 or 8 words replaced.
Brute force computes the Jaccard similarity of the sets of
5-grams of all pairs that share one. A dropped document is right if a pair with it reaches the threshold; such a pair
is found if one of its documents is dropped. Each side runs in a process of its own, after its imports, on one core.

PYTHON: the interpreter of an environment with datatrove (`pip install datatrove[processing] orjson`) or datasketch.
ptft does not depend on them. datasketch gets the first tenth of the documents.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

EDITS = (0, 1, 2, 4, 8)
THRESHOLD = 0.8
NGRAM = 5
WORDS = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--datatrove", metavar="PYTHON")
    parser.add_argument("--datasketch", metavar="PYTHON")
    parser.add_argument("--side", choices=list(SIDES), help="internal: run one side in this process")
    parser.add_argument("--folder", type=Path, help="internal: where the documents are")
    options = parser.parse_args()
    if options.side is not None:
        run_side(options.side, options.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = write_documents(folder / "documents.jsonl", options.documents)
        pairs = similar_pairs(read(folder))
        print(f"{options.documents:,} documents; {len(pairs):,} pairs of similarity {THRESHOLD} or more", flush=True)
        pythons = {"ours": sys.executable, "datatrove": options.datatrove, "datasketch": options.datasketch}
        for side, python in pythons.items():
            if python is not None:
                judge(side, started(python, side, folder), pairs, planted)


def write_documents(path: Path, count: int) -> dict[int, tuple[int, int]]:
    """Write the documents; return copy -> (its original, replaced words)."""
    books = sorted((Path(os.environ["PTFT_TEST_DATA"]) / "text/en_gutenberg").glob("*.txt"))
    words = " ".join(book.read_text() for book in books).split()
    chance = random.Random(0)
    documents: list[list[str]] = []
    planted = {}
    with path.open("w") as file:
        for number in range(count):
            if number > 100 and chance.random() < 0.2:
                original, edits = chance.randrange(number), chance.choice(EDITS)
                document = list(documents[original])
                for at in chance.sample(range(len(document)), edits):
                    document[at] = chance.choice(words)
                planted[number] = (original, edits)
            else:
                document = []
                while len(document) < WORDS:
                    start = chance.randrange(len(words) - 12)
                    document += words[start : start + chance.randint(4, 12)]
            documents.append(document)
            file.write(json.dumps({"text": " ".join(document), "id": str(number)}) + "\n")
    return planted


def read(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "documents.jsonl").open()]


def similar_pairs(texts: list[str]) -> np.ndarray:
    """All pairs whose sets of 5-grams reach the threshold: int64 [P, 2], the earlier one first."""
    from scipy.sparse import csr_array

    numbers: dict[tuple[str, ...], int] = {}
    indices: list[np.ndarray] = []
    for text in texts:
        words = text.split()
        grams = {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}
        indices.append(np.fromiter((numbers.setdefault(gram, len(numbers)) for gram in grams), np.int32, len(grams)))
    sizes = np.array(list(map(len, indices)))
    shape = (len(texts), len(numbers))
    flat = np.concatenate(indices)
    matrix = csr_array((np.ones(len(flat), np.int16), flat, np.concatenate(([0], np.cumsum(sizes)))), shape=shape)
    inverted = matrix.T.tocsr()
    found = []
    for start in range(0, len(texts), 5000):
        common = (matrix[start : start + 5000] @ inverted).tocoo()
        one, other, shared = common.row.astype(np.int64) + start, common.col.astype(np.int64), common.data
        similar = (shared >= THRESHOLD * (sizes[one] + sizes[other] - shared)) & (one < other)
        found.append(np.stack((one[similar], other[similar]), axis=1))
    return np.concatenate(found)


def judge(side: str, result: dict[str, Any], pairs: np.ndarray, planted: dict[int, tuple[int, int]]) -> None:
    count, dropped = result["documents"], np.zeros(result["documents"], bool)
    dropped[result["dropped"]] = True
    pairs = pairs[(pairs < count).all(axis=1)]
    similar = np.zeros(count, bool)
    similar[pairs.ravel()] = True
    recall = (dropped[pairs[:, 0]] | dropped[pairs[:, 1]]).mean()
    precision = similar[dropped].mean()
    by_edits = {edits: [dropped[i] for i, (_, own) in planted.items() if own == edits and i < count] for edits in EDITS}
    shown = ", ".join(f"{edits}: {np.mean(drops):.3f}" for edits, drops in by_edits.items())
    print(
        f"{side:>10}: {count:,} documents, precision {precision:.4f}, recall {recall:.4f}; "
        f"{count / result['cpu_s']:,.0f} documents/s of CPU ({result['cpu_s']:.1f} s, wall {result['wall_s']:.1f} s), "
        f"peak memory {result['peak_mb']:.0f} MB ({result['before_mb']:.0f} MB before); "
        f"dropped copies by replaced words: {shown}",
        flush=True,
    )


# --- one side, in a process of its own -------------------------------------------------------------------------------


def started(python: str, side: str, folder: Path) -> dict[str, Any]:
    command = [python, __file__, "--side", side, "--folder", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((folder / f"{side}.json").read_text())


def run_side(side: str, folder: Path) -> None:
    work = SIDES[side](folder)
    before_mb = peak_mb()
    wall, cpu = time.perf_counter(), time.process_time()
    count, dropped = work()
    result = {
        "documents": count,
        "dropped": dropped,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "before_mb": before_mb,
        "peak_mb": peak_mb(),
    }
    (folder / f"{side}.json").write_text(json.dumps(result))


def peak_mb() -> float:
    """Of this program; ru_maxrss includes the one that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def ours(folder: Path) -> Any:
    import rensa  # noqa: F401
    import scipy.sparse.csgraph  # noqa: F401
    import xxhash  # noqa: F401

    from ptft_dist.config.cleaning import NearDedupStep
    from ptft_dist.data.cleaning.near_dedup import NearDedup

    def work() -> tuple[int, list[int]]:
        dedup = NearDedup(NearDedupStep(threshold=THRESHOLD, ngram=NGRAM))
        signatures, chunk = [], []
        for line in (folder / "documents.jsonl").open():
            chunk.append(json.loads(line)["text"])
            if len(chunk) == 2000:
                signatures.append(dedup.sign(chunk))
                chunk = []
        original = dedup.originals([*signatures, dedup.sign(chunk)])
        return len(original), np.flatnonzero(original != np.arange(len(original))).tolist()

    return work


def datatrove(folder: Path) -> Any:
    from datatrove.data import DocumentsPipeline
    from datatrove.executor import LocalPipelineExecutor  # noqa: F401
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Split(WordTokenizer):
        """Its English one needs spaCy and is far slower."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    def work() -> tuple[int, list[int]]:
        config = MinhashConfig(n_grams=NGRAM)  # 14 bands of 8 hashes
        sign = MinhashDedupSignature(str(folder / "sig"), config, language=Split())
        documents: DocumentsPipeline = JsonlReader(str(folder), glob_pattern="documents.jsonl").run(None, 0, 1)
        sign.run(documents, 0, 1)
        for bucket in range(config.num_buckets):
            MinhashDedupBuckets(str(folder / "sig"), str(folder / "buckets"), config=config).run(
                None, bucket, config.num_buckets
            )
        MinhashDedupCluster(str(folder / "buckets"), str(folder / "removed"), config=config).run(None, 0, 1)
        removed = np.fromfile(next((folder / "removed").rglob("*.remove")), "<u4")
        with (folder / "documents.jsonl").open() as file:
            return sum(1 for _ in file), removed.tolist()

    return work


def datasketch(folder: Path) -> Any:
    from datasketch import MinHash, MinHashLSH

    def work() -> tuple[int, list[int]]:
        texts = read(folder)
        texts = texts[: len(texts) // 10]
        lsh = MinHashLSH(threshold=THRESHOLD, num_perm=128)
        dropped = []
        for number, text in enumerate(texts):
            words = text.split()
            grams = {" ".join(words[i : i + NGRAM]).encode() for i in range(len(words) - NGRAM + 1)}
            own = MinHash(num_perm=128)
            own.update_batch(grams)
            if lsh.query(own):
                dropped.append(number)
            lsh.insert(number, own)
        return len(texts), dropped

    return work


SIDES = {"ours": ours, "datatrove": datatrove, "datasketch": datasketch}


if __name__ == "__main__":
    main()

"""What `ptft train` prints when a run has ended: the results for stdout, and how to continue a stopped run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ptft_dist.config.secrets import hide
from ptft_dist.reporting.messages import plain

_WIDTH = 16


def results(
    run_dir: Path,
    metrics: Mapping[str, float],
    first: Mapping[str, float],
    metric: str,
    *,
    note: str = "",
    model: Path | None = None,
    samples: bool = False,
    report: Path | None = None,
    generates: bool = False,
) -> str:
    """The results of a run, and the commands that a user needs next. result.json has all metrics.

    Args:
        metrics: of the evaluation to show; empty without an evaluation.
        first: metrics of the first evaluation. If it is the only one, no change is shown.
        metric: `eval.metric`. It is shown, and the loss.
        note: about the evaluation, such as which update is the best one.
    """
    names = [name for name in dict.fromkeys((f"eval/{metric}", "eval/loss")) if name in metrics]
    lines = [(name, _change(first.get(name), metrics[name], single=first == metrics)) for name in names]
    lines += [("", note)] if note else []
    lines += [("model", str(model))] if model is not None else []
    lines += [("samples", str(run_dir / "samples.jsonl"))] if samples else []
    lines.append(("metrics", str(run_dir / "metrics.jsonl")))
    lines += [("report", str(report))] if report is not None else []
    lines += [("next" if i == 0 else "", line) for i, line in enumerate(_next(run_dir, model, metrics, generates))]
    return hide("\n".join(f"{name:<{_WIDTH}} {text}" for name, text in lines))


def _change(first: float | None, last: float, *, single: bool) -> str:
    """`5.778 -> 2.259 (-3.519)`, or the value alone. first: None for a metric that is new since a resume."""
    if first is None or single:
        return plain(last)
    return f"{plain(first)} -> {plain(last)} ({last - first:+.4g})"


def _next(run_dir: Path, model: Path | None, metrics: Mapping[str, Any], generates: bool) -> Iterator[str]:
    run = shlex.quote(str(run_dir))
    if model is not None and generates:
        yield f"ptft generate {run} --prompt TEXT"
    if model is not None and metrics:
        yield f"ptft evaluate {run}"
    yield f"ptft tensorboard {run}"


def continuing(words: Sequence[str], *, in_job: bool = False) -> str:
    """The command that continues a stopped run: that of this start, without --resume, which may mean to start over.

    Args:
        words: the command line; not one of `ptft train` in scripts and notebooks.
        in_job: in a Slurm job, which may be requeued, or an interactive one.
    """
    if in_job:
        return f"a requeued job resumes; otherwise {continuing(words)}"
    if len(words) < 2 or Path(words[0]).name not in ("ptft", "__main__.py") or words[1] != "train":
        return "continue with the same call"
    kept: list[str] = []
    for word in words[1:]:
        if kept and kept[-1] == "--resume":
            kept.pop()
        elif not word.startswith("--resume="):
            kept.append(word)
    return f"continue with: {shlex.join(['ptft', *kept])}"

"""The output of `ptft evaluate --lm-eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ptft_dist.judging.harness import HarnessResult


def show(result: HarnessResult) -> None:
    """Print a line for each metric of each task."""
    lines = [("task", "rows", "shots", "metric", "value", "stderr")]
    for task, metrics in result.tasks.items():
        for name, value in metrics.items():
            base, *rest = name.split(",")
            if base.endswith("_stderr"):
                continue
            error = metrics.get(",".join([f"{base}_stderr", *rest]))
            rows, shots = result.rows.get(task, ""), result.shots.get(task, "")
            lines.append((task, f"{rows}", f"{shots}", name, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip())

"""The terminal as a writer of metrics: a progress bar, or plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ptft_dist.reporting.messages import LIVE, PLAIN_EVERY_S, clock, write_now

LONGEST_LINE = 100
"""Characters of the line of an evaluation."""
_SHORTEST_BAR = 14
"""Characters, with the percentage."""


class Terminal:
    """Shows a bar on a terminal, otherwise a line with the time every few seconds, so that logs stay short."""

    def __init__(self, total_steps: int, first_step: int, metric: str) -> None:
        """metric: `eval.metric`, which is shown beside the loss."""
        self.total_steps, self.first_step, self.metric = total_steps, first_step, metric
        self.started, self.last_plain = time.monotonic(), 0.0
        self.live = sys.stderr.isatty()
        self.evaluated = ""
        self.last: tuple[int, str] | None = None
        """The update on the bar, and its text."""

    def write(self, row: Mapping[str, Any]) -> None:
        if "loss" not in row:
            names = [name for name in dict.fromkeys(("eval/loss", f"eval/{self.metric}")) if name in row]
            shown = [f"{name} {row[name]:.4g}" for name in names]  # metrics.jsonl has the others
            self.evaluated = "".join(f"  {text}" for text in shown[-1:])
            self._line("  ".join([self._position(row["step"]), *shown]))
            return
        step, now = row["step"], time.monotonic()
        left_s = (now - self.started) / max(1, step - self.first_step) * (self.total_steps - step)
        more = "".join(f"  {name} {row[name]:.4g}" for name in ("reward", "kl") if name in row)  # of rollouts
        text = f"loss {row['loss']:.4f}{more}  {row['tokens_per_s']:,.0f} tokens/s  {clock(left_s)} left"
        if self.live:
            self.last = (step, text)
            LIVE.show(self._bar(step, text))
        elif step == self.total_steps or now - self.last_plain >= PLAIN_EVERY_S:
            self.last_plain = now
            self._line(f"{self._position(step)}  {text}")

    def _position(self, step: int) -> str:
        return f"step {step:,}/{self.total_steps:,}"

    def _bar(self, step: int, text: str) -> str:
        """One line of the terminal: the bar takes the room that the text leaves."""
        columns = _columns() - 1
        text = f"{self._position(step)}  {text}"
        if len(text) + len(self.evaluated) + _SHORTEST_BAR <= columns:
            text += self.evaluated
        shape, elapsed_s = f"{{percentage:3.0f}}% {{bar}} {text}", time.monotonic() - self.started
        return str(tqdm.format_meter(step, self.total_steps, elapsed_s, ncols=columns, bar_format=shape))

    def _line(self, text: str) -> None:
        """A line that stays, above the bar."""
        LIVE.clear()
        prefix = "" if self.live else time.strftime("%m-%d %H:%M:%S  ")
        write_now((prefix + text)[:LONGEST_LINE], sys.stderr)
        if self.last is not None:
            LIVE.show(self._bar(*self.last))

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: samples.jsonl has the texts."""

    def flush(self) -> None:
        """Nothing: each line is flushed."""

    def close(self) -> None:
        if bar := LIVE.clear():
            write_now(bar, sys.stderr)


def _columns() -> int:
    """The width of the terminal that shows stderr; some terminals say 0, and one that was closed says nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80

"""The terminal as a writer of metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ptft_dist.reporting.messages import clock


class Terminal:
    """Shows a live line on a terminal, otherwise a plain line every few seconds, so that logs stay short."""

    PLAIN_EVERY_S = 10.0

    def __init__(self, total_steps: int, first_step: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total_steps, self.first_step = total_steps, first_step
        self.started, self.last_plain = time.monotonic(), 0.0
        self.live = self.stream.isatty()

    def write(self, row: Mapping[str, Any]) -> None:
        if any(key.startswith("eval/") for key in row):
            shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k.startswith("eval/") and k != "eval/time_s")
            self._line(f"step {row['step']:,}  {shown}", keep=True)
            return
        step, now = row["step"], time.monotonic()
        ended = step == self.total_steps
        if not self.live and not ended and now - self.last_plain < self.PLAIN_EVERY_S:
            return
        self.last_plain = now
        left_s = (now - self.started) / max(1, step - self.first_step) * (self.total_steps - step)
        text = f"step {step:,}/{self.total_steps:,}  loss {row['loss']:.4f}  lr {row['lr']:.2e}"
        text += f"  {row['tokens_per_s']:,.0f} tokens/s  {clock(left_s)} left"
        self._line(text, keep=not self.live or ended)

    def _line(self, text: str, keep: bool) -> None:
        start, end = ("\r\x1b[2K", "\n" if keep else "") if self.live else ("", "\n")
        print(start + text, end=end, file=self.stream, flush=True)

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self.live:
            print(file=self.stream, flush=True)

"""One thing that `ptft doctor` has looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do about it."""

    topic: str
    """Such as packages or GPUs."""
    name: str
    level: Literal["ok", "warning", "error", "absent"]
    """`error`: nothing can be trained; `warning`: something that some recipes need is missing or slow; `absent`: this
    machine lacks it, which is no fault."""
    text: str
    remedy: str = ""

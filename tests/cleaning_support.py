"""Texts and settings for the tests of cleaning steps."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from ptft_dist.config.cleaning import StepSection
from ptft_dist.data.cleaning.registry import text_step
from ptft_dist.data.cleaning.text_step import Cleaned, TextStep

DATA = Path(os.environ.get("PTFT_TEST_DATA", "missing"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs PTFT_TEST_DATA")


def step(name: str, base: Path = Path(), **settings: Any) -> TextStep:
    """The step as a recipe names it."""
    return text_step(StepSection.model_validate({name: settings}).settings, base)


def clean(name: str, text: str, **settings: Any) -> Cleaned:
    return step(name, **settings)(text)


def random_texts(alphabet: str, count: int, seed: int, longest: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(count)]

"""The generated pages: file name -> text."""

from __future__ import annotations

from pathlib import Path

from reference_pages.commands import commands_page
from reference_pages.metrics import metrics_page
from reference_pages.recipe import recipe_page

FOLDER = Path(__file__).parent.parent / "reference"


def pages() -> dict[str, str]:
    """Every page in docs/reference that is generated, by its file name."""
    texts = {"recipe.md": recipe_page(), "commands.md": commands_page(), "metrics.md": metrics_page()}
    return {name: text.rstrip("\n") + "\n" for name, text in texts.items()}

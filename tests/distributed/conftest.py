"""Two ranks accumulate too: a rank has more than one micro-batch per update."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import support


@pytest.fixture(autouse=True, scope="module")
def small_micro_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "MICRO_SIZE", 3)
        yield

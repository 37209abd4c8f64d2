"""DeepSpeed's compiled operations."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence


def compilable(builders: Sequence[str]) -> dict[str, bool]:
    """Whether DeepSpeed could compile these operations here, such as CPUAdamBuilder, as it does when one is used."""
    logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepspeed.ops.op_builder as known

        return {name: bool(getattr(known, name)().is_compatible(verbose=False)) for name in builders}

"""A private Slurm cluster for the tests of this directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, missing, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    absent = missing()
    if absent:
        pytest.skip(f"no Slurm here ({', '.join(absent)} missing): apt-get install slurm-wlm munge")
    with running(Cluster) as started:
        yield started

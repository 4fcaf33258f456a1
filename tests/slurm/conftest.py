"""The cluster is brought up once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of a real Slurm; skips, saying why, where none can be started."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    # A short path: Unix sockets must fit into 107 characters.
    folder: Path = tmp_path_factory.mktemp("slurm")
    with Cluster(folder, num_nodes=2) as running:
        yield running

"""Give each test a store of either engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import crewlog
from cluster import Cluster
from crewlog.registry import Registry


@pytest.fixture(params=["directory", "etcd"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name a place of either kind where there is no store yet."""
    if request.param == "directory":
        return str(tmp_path / "store")
    cluster: Cluster = request.getfixturevalue("one_server")
    return cluster.url(f"test/{tmp_path.name}")


@pytest.fixture
def reg(where: str) -> Iterator[Registry]:
    """Open a registry there."""
    with crewlog.open(where) as registry:
        yield registry

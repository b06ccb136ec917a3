"""Give each test a prefix of its own on one server."""

from pathlib import Path

import pytest

from cluster import Cluster


@pytest.fixture
def url(one_server: Cluster, tmp_path: Path) -> str:
    """Name a place on the server where there is no store yet."""
    return one_server.url(f"test/{tmp_path.name}")

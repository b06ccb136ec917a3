"""The page about etcd is true: its flags exist, its backup comes back."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import crewlog
from cluster import MISSING, Cluster
from crewlog_compactor import verify

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
PAGE = (Path(__file__).parents[2] / "docs" / "etcd.md").read_text()
BLOCKS = [code for name, code in re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL) if not name]


def test_flags_of_the_recipe_exist() -> None:
    """Each option of the servers is one that this etcd knows."""
    done = subprocess.run(["etcd", "--help"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"--[a-z-]+", done.stdout + done.stderr))
    flags = re.findall(r"--[a-z-]+", BLOCKS[0])
    assert len(flags) > 15
    assert {*flags} <= known


@pytest.mark.skipif(not shutil.which("etcdctl"), reason="etcdctl is missing (Debian: etcd-client)")
def test_backup_of_the_page_comes_back(tmp_path: Path) -> None:
    """Saved, restored into another directory, started from there: whole, and older."""
    save, restore = next(b for b in BLOCKS if "snapshot save" in b).splitlines()
    with Cluster(tmp_path / "home") as cluster:
        (server,) = cluster.servers
        place = cluster.url("crew")
        with crewlog.open(place) as reg:
            reg.register("a")
            env = {
                "PATH": "/usr/bin:/bin:/usr/local/bin",
                "ETCDCTL_API": "3",
                "ETCDCTL_ENDPOINTS": f"127.0.0.1:{server.port}",
            }
            subprocess.run(shlex.split(save), cwd=tmp_path, env=env, check=True)
            reg.update("a", state="ready")
        server.kill()
        shutil.rmtree(server.home / "data")
        more = ["--name", server.name, "--initial-cluster", f"{server.name}={server.peer_url}",
                "--initial-advertise-peer-urls", server.peer_url]  # fmt: skip
        done = subprocess.run(
            [*shlex.split(restore), *more], cwd=tmp_path, env=env, check=False, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        (tmp_path / "restored").rename(server.home / "data")
        server.start()
        cluster.wait()
        with crewlog.open(place) as reg:
            assert [(w.sid, w.state) for w in reg.workers()] == [("a", "starting")]
            reg.register("b")
        assert verify(place).ok


@pytest.mark.skipif(not shutil.which("etcdctl"), reason="etcdctl is missing (Debian: etcd-client)")
def test_commands_of_etcdctl_exist() -> None:
    """Roles, users, compaction, alarms."""
    for row in [r for block in BLOCKS for r in block.splitlines() if r.startswith("etcdctl")]:
        for words in re.split(r" && |\$\(|\)", row):
            if words.startswith("etcdctl"):
                command = [w for w in words.split() if not w.startswith("-")][1:3]
                done = subprocess.run(
                    ["etcdctl", *command[:2], "--help"],
                    capture_output=True, text=True, check=False, env={"ETCDCTL_API": "3"},
                )  # fmt: skip
                assert f"etcdctl {command[0]}" in done.stdout.replace("\n", " "), words

"""What is built is whole, and disturbs nobody beside it."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

pytest.importorskip("hatchling", reason="hatchling is not installed (pip install hatchling)")

ROOT = Path(__file__).parent.parent
PACKAGES = ("crewlog", "crewlog_compactor", "crewlog_cli")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both distributions, without a network."""
    where = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(where)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    return where


def wheel_of(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_wheel_holds_every_module_and_the_files_beside_them(built: Path) -> None:
    """Three packages with names of their own, typed, with the page's parts; nothing else."""
    names = set(zipfile.ZipFile(wheel_of(built)).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    for folder, package in zip(("eventlog", "compactor", "cli"), PACKAGES, strict=True):
        for path in (ROOT / folder / package).iterdir():
            if path.is_file():
                assert f"{package}/{path.name}" in names
    assert {"crewlog/py.typed", "crewlog_compactor/py.typed", "crewlog_cli/pages/page.js"} <= names


def test_sdist_holds_what_the_tests_need(built: Path) -> None:
    """Who packages it can test it."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for wanted in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "tests/conftest.py",
                   "docs/protocol.md", "bench/run.py"):  # fmt: skip
        assert wanted in names


def test_packages_called_like_our_directories_are_left_alone(built: Path, tmp_path: Path) -> None:
    """`cli`, `eventlog` and `compactor` are taken: beside them nothing is overwritten."""
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=True)
    python = str(tmp_path / "venv/bin/python")
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    for name in ("cli", "eventlog", "compactor"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text(f"mine = {name!r}\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--disable-pip-version-check", str(wheel_of(built))], check=True,
    )  # fmt: skip
    code = "import cli, eventlog, compactor; print(cli.mine, eventlog.mine, compactor.mine)"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "cli eventlog compactor\n"
    assert (tmp_path / "venv/bin/crewlog").exists()
    assert all((site / name / "__init__.py").exists() for name in PACKAGES)

"""What a build ships: each file of the four folders once, under metadist/, and importable there."""

import importlib
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import metadist

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("algorithms", "tasks", "cluster")


def run(*args: str | Path, cwd: Path) -> str:
    result = subprocess.run(
        [sys.executable, *args], cwd=cwd, check=False, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def sources(folder: str) -> list[str]:
    """The files of one folder as sorted paths from the root; does not enter the links."""
    paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    skipped: set[tuple[str, ...]] = {("metadist", name) for name in LINKED}
    # What scripts/docs writes.
    skipped |= {("docs", "_build"), ("docs", "algorithms"), ("docs", "api", "names")}
    return sorted(
        path.as_posix()
        for path in paths
        if "__pycache__" not in path.parts and skipped.isdisjoint((path.parts[:2], path.parts[:3]))
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    run("-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = built.glob("*.whl")
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target")
    run(*pip, folder, wheel, cwd=folder)
    return folder


@pytest.mark.parametrize("name", LINKED)
def test_links_are_relative(name):
    link = ROOT / "metadist" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_sdist_holds_every_folder_once(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    folders = ["metadist", *LINKED, "examples", "tests", "scripts", "docs"]
    expected = [path for folder in folders for path in sources(folder)]
    assert sorted(name for name in names if "/" in name) == sorted(expected)
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= {
        name for name in names if "/" not in name
    }


def test_wheel_holds_every_module_and_data_file_once(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    linked = [f"metadist/{path}" for folder in LINKED for path in sources(folder)]
    assert sorted(names) == sorted(sources("metadist") + linked)


def test_installed_wheel_imports(installed):
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import metadist, metadist.algorithms, metadist.tasks, metadist.cluster
for module in (metadist, metadist.algorithms, metadist.tasks, metadist.cluster):
    print(module.__file__)
"""
    files = run("-I", "-c", code, cwd=installed).split()
    assert len(files) == 4
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_the_newest_release_is_this_version():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    citation = (ROOT / "CITATION.cff").read_text()
    version, date = re.findall(r"(?m)^## \[([\d.]+)\] - (\S+)$", changelog)[0]
    assert version == metadist.__version__
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
    assert changelog.index("\n## [Unreleased]\n") < changelog.index(f"## [{version}]")


@pytest.mark.parametrize("name", LINKED)
def test_bare_names_are_refused(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"import metadist.{name}, not {name}"):
        importlib.import_module(name)

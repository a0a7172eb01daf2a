"""`metadist data`: the door to `metadist.tasks.fetch`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from metadist.tasks.data import sources as data_sources

CONTENT = b"0, 1, 2"


@pytest.fixture(autouse=True)
def sources(monkeypatch, tmp_path):
    """One data set, and one that cannot be had."""
    digest = hashlib.sha256(CONTENT).hexdigest()

    def way(folder: Path) -> dict[str, bytes]:
        return {"numbers/all.csv": CONTENT}

    def nowhere(folder: Path) -> dict[str, bytes]:
        raise data_sources.FetchError("no network")

    here = data_sources.Source({"numbers/all.csv": digest}, {"here": way}, "free")
    gone = data_sources.Source({"gone/all.csv": digest}, {"away": nowhere}, "none named")
    monkeypatch.setattr(data_sources, "SOURCES", {"numbers": here, "gone": gone})
    monkeypatch.setenv("METADIST_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")


def test_list_shows_names_files_and_licences(cli, tmp_path):
    out = cli.good("data", "list")
    for word in ("numbers", "numbers/all.csv", "free", "gone", "none named", tmp_path / "data"):
        assert str(word) in out


def test_fetch_leaves_the_files_below_the_root(cli, tmp_path):
    assert "numbers is below" in cli.good("data", "fetch", "numbers")
    assert (tmp_path / "data" / "numbers" / "all.csv").read_bytes() == CONTENT
    cli.good("data", "fetch", "numbers", "--root", tmp_path / "other")
    assert (tmp_path / "other" / "numbers" / "all.csv").read_bytes() == CONTENT


def test_what_cannot_be_fetched_is_told(cli):
    code, _, err = cli("data", "fetch", "gone")
    assert code == 1
    assert "metadist data: failed: data set 'gone' must be fetched" in err and "no network" in err
    for arguments, message in (
        (["fetch"], "name must be one of numbers, gone, got none"),
        (["fetch", "cats"], "name must be one of ['gone', 'numbers'], got 'cats'"),
        (["list", "numbers"], "name must not be given with list, got 'numbers'"),
    ):
        code, out, err = cli("data", *arguments)
        assert (code, out) == (2, "") and f"metadist data: error: {message}" in err
    assert cli("data", "sell")[0] == 2

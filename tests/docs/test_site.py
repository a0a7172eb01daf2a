"""The site: every public name has one place, and docstrings become what they look like."""

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def docstrings(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    return runpy.run_path(str(DOCS / "_extensions" / "plain_docstrings.py"))


def test_every_public_name_is_on_one_page_of_the_reference():
    names = [
        found
        for page in (DOCS / "api").glob("*.md")
        for found in re.findall(r"(?m)^(?:   |\.\. autodata:: )(metadist\.\S+)$", page.read_text())
    ]
    public = set((ROOT / "tests" / "public_api.txt").read_text().split())
    algorithms = {name for name in public if re.fullmatch(r"metadist\.algorithms\.[A-Z]\w*", name)}
    algorithms -= {"metadist.algorithms.ALGORITHMS"}  # the others have pages of their own
    # The family of language models has a package of its own, with the names of metadist.tasks.
    public -= {name for name in public if ".language." in name}
    missing = public - algorithms - set(names)
    assert not missing, f"name them on a page of docs/api: {', '.join(sorted(missing))}"
    assert sorted(names) == sorted(public - algorithms)


def test_a_docstring_is_read_as_it_is_written(docstrings):
    lines = """Gives y* for |x| and `a|b`.

    h = f_x - J v

    q = 1

Args:
    x, y_: Outer and inner,
        y_ in `Params`:
        * one
    *rest: More.
        Text.

            code

Raises:
    ValueError: Never.

Cost: T G.
Source: Ji_,
2021.""".splitlines()
    found = "\n".join(docstrings["to_rst"](lines))
    assert (
        re.sub(r"\n\n+", "\n\n", found)
        == r"""Gives y\* for \|x\| and ``a|b``.

::

    h = f_x - J v

    q = 1

.. rubric:: Args

``x, y_``
    Outer and inner,
    y\_ in ``Params``:

    * one

``*rest``
    More.
    Text.

    ::

        code

.. rubric:: Raises

``ValueError``
    Never.

:Cost: T G.
:Source: Ji\_,
    2021.
"""
    )
    assert docstrings["entries"]("\n".join(lines))["y_"][0] == "Outer and inner,"


def test_links_of_pages_lead_to_what_the_site_has(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    for_site = runpy.run_path(str(DOCS / "_extensions" / "markdown_links.py"))["for_site"]
    repository = "https://github.com/metadist/metadist/blob/main"
    page = "[a](../examples/few_shot.py) [b](algorithms.md#itd) [c](algorithms.md#how-to-choose)"
    expected = f"[a]({repository}/examples/few_shot.py) [b](algorithms/itd.md) "
    assert for_site(page, "tasks") == expected + "[c](algorithms.md#how-to-choose)"
    page = "[a](../tasks.md) [b](../../CONTRIBUTING.md) [c](../algorithms.md#itd)"
    expected = f"[a](../tasks.md) [b]({repository}/CONTRIBUTING.md) [c](../algorithms/itd.md)"
    assert for_site(page, "migration/higher") == expected
    assert for_site("[a](#itd)", "algorithms") == "[a](algorithms/itd.md)"

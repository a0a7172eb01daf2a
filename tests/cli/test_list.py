"""`metadist list`."""

from __future__ import annotations

import re

import pytest

from metadist.cli.catalogue import brief, title
from metadist.cli.names import KINDS, named
from tests.cli.helpers import flat


def test_list_names_everything_that_has_a_short_name(cli):
    out = flat(cli.good("list"))
    for name in (name for kind in KINDS for name in named(kind)):
        assert re.search(rf"\b{name}\b", out), name
    assert re.search(r"algorithms --algorithm aid, .* problems --problem amigo_toy, .* models", out)
    assert "glyphs A sampler of N-way K-shot tasks" in flat(cli.good("list", "samplers"))
    assert "conv4 Four blocks" in flat(cli.good("list", "models"))
    assert "local " in cli.good("list", "executors")
    assert "ssp Stale synchronous" in flat(cli.good("list", "policies"))


@pytest.mark.parametrize("width", [80, 200])
def test_list_algorithms_shows_all_facts_at_any_width(cli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = cli.good("list", "algorithms")
    assert max(map(len, out.splitlines())) <= width
    assert "G = grad_y g" in out
    # Every word of every fact; in a table the lines of a cell are not one after another.
    found = set(flat(out).split())
    for name, cls in named("algorithms").items():
        assert name in found
        shown = [brief(cls.doc, fact) for fact in ("Source", "Use", "For", "Cost", "State")]
        assert all(shown) and set(" ".join([title(cls.doc), *shown]).split()) <= found, name


def test_an_unknown_kind_is_refused(cli):
    code, out, err = cli("list", "optimisers")
    assert code == 2 and out == ""
    assert "metadist list: error: kind must be one of algorithms, problems, models, sam" in err

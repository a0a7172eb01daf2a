"""What the catalogue reads from docstrings, and algorithms of one's own without these lines."""

from pathlib import Path

import pytest
from rich.console import Console

import metadist.algorithms
from metadist.algorithms import ALGORITHMS, SOBA
from metadist.cli.catalogue import FAMILIES, WIDE, brief, cards, facts, title


class Own(SOBA):
    """A method of one's own.

    For: this is read. It goes on.
    and on
    the next line.

    Cost is not a fact here, and neither is
    Note: this.

    Source: nobody.
    """


class Plain(SOBA):
    """A method without facts."""


def test_facts_are_paragraphs_that_start_with_their_name():
    expected = {"For": "this is read. It goes on. and on the next line.", "Source": "nobody."}
    assert facts(Own) == expected
    assert (title(Own), brief(Own, "For")) == ("A method of one's own", "this is read")
    assert facts(Plain) == {} and brief(Plain, "Cost") == ""


@pytest.mark.parametrize("width", [80, WIDE])
def test_an_algorithm_without_facts_is_listed(width):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(cards({"plain": Plain}, width))
    text = capture.get()
    assert "plain" in text and "A method without facts" in text


def test_a_first_sentence_is_one_that_fits_a_table():
    for cls in ALGORITHMS.values():
        for fact in ("For", "Cost", "State", "Use"):
            assert 0 < len(brief(cls, fact)) <= 100


def test_every_algorithm_is_public_and_of_a_known_family():
    assert {brief(cls, "Family") for cls in ALGORITHMS.values()} == set(FAMILIES)
    assert set(metadist.algorithms.__all__) == {
        "ALGORITHMS",
        *(c.__name__ for c in ALGORITHMS.values()),
    }
    files = Path(metadist.algorithms.__file__).parent.glob("[!_]*.py")
    assert len(list(files)) == len(ALGORITHMS)

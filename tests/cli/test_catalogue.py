"""What the catalogue reads from docstrings, and algorithms of one's own without these lines."""

import ast
import inspect
from pathlib import Path

import pytest
from rich.console import Console

import metadist.algorithms
from metadist.algorithms import ALGORITHMS
from metadist.cli.catalogue import FAMILIES, WIDE, brief, cards, facts, title
from metadist.cli.classes import PublicClass

OWN = """A method of one's own.

For: this is read. It goes on.
and on
the next line.

Cost is not a fact here, and neither is
Note: this.

Source: nobody.
"""


def test_facts_are_paragraphs_that_start_with_their_name():
    expected = {"For": "this is read. It goes on. and on the next line.", "Source": "nobody."}
    assert facts(OWN) == expected
    assert (title(OWN), brief(OWN, "For")) == ("A method of one's own", "this is read")
    assert facts("A method without facts.") == {} and brief("A method.", "Cost") == ""


@pytest.mark.parametrize("width", [80, WIDE])
def test_an_algorithm_without_facts_is_listed(width):
    plain = ast.parse('class Plain:\n    """A method without facts."""')
    (node,) = (node for node in plain.body if isinstance(node, ast.ClassDef))
    console = Console(width=width)
    with console.capture() as capture:
        console.print(cards({"plain": PublicClass((node,))}, width))
    text = capture.get()
    assert "plain" in text and "A method without facts" in text


def test_a_first_sentence_is_one_that_fits_a_table():
    for cls in ALGORITHMS.values():
        for fact in ("For", "Cost", "State", "Use"):
            assert 0 < len(brief(inspect.getdoc(cls) or "", fact)) <= 100


def test_every_algorithm_is_public_and_of_a_known_family():
    assert {brief(inspect.getdoc(cls) or "", "Family") for cls in ALGORITHMS.values()} == set(
        FAMILIES
    )
    assert set(metadist.algorithms.__all__) == {
        "ALGORITHMS",
        *(c.__name__ for c in ALGORITHMS.values()),
    }
    files = Path(metadist.algorithms.__file__).parent.glob("[!_]*.py")
    assert len(list(files)) == len(ALGORITHMS)

"""docs/algorithms.md tells what the classes tell."""

import re
from pathlib import Path

import pytest

from metadist.algorithm import Card
from metadist.algorithms import ALGORITHMS

FOLDER = Path(__file__).resolve().parents[1] / "docs"
TEXT = (FOLDER / "algorithms.md").read_text()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_the_row_of_its_card_and_a_section(name):
    cls = ALGORITHMS[name]
    assert cls.card is not None
    card = Card(*cls.card)
    facts = (card.title, card.problems, card.cost, card.state, card.use)
    row = f"| [{name}](#{name}) | {' | '.join(facts)} |"
    assert row in TEXT.splitlines(), f"the table must have this row:\n{row}"
    section = TEXT.partition(f"\n## {cls.__name__}\n")[2].partition("\n#")[0]
    for word in ("\n    ", "\n* Keeps ", "Costs ", "\n* Source: "):
        assert word in section, (name, word)


def test_no_algorithm_is_described_that_is_not_there():
    sections = TEXT.partition("\n# Through the inner loop\n")[2]
    found = re.findall(r"^## (\S+)$", sections, re.MULTILINE)
    assert sorted(found) == sorted(cls.__name__ for cls in ALGORITHMS.values())
    rows = re.findall(r"^\| \[(\w+)\]", TEXT, re.MULTILINE)
    assert rows == list(ALGORITHMS)


def test_links_lead_somewhere():
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", TEXT)}
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert (FOLDER / link).exists(), link


def test_lines_are_short_outside_of_the_table():
    assert not [line for line in TEXT.splitlines() if len(line) > 100 and line[0] != "|"]

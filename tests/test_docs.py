"""docs/algorithms.md says what the docstrings of the classes say, and its links lead somewhere."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs"
TEXT = (FOLDER / "algorithms.md").read_text()


def test_the_page_is_what_the_script_writes():
    page = runpy.run_path(str(ROOT / "scripts" / "docs_algorithms.py"))["page"]
    assert page(TEXT) == TEXT, "run .venv/bin/python scripts/docs_algorithms.py"


def test_links_lead_somewhere():
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"(?m)^#+ (.*)$", TEXT)}
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert (FOLDER / link).exists(), link


def test_lines_are_short_outside_of_the_table():
    assert not [line for line in TEXT.splitlines() if len(line) > 100 and line[0] != "|"]


def test_no_line_is_a_bullet_by_accident():
    assert not re.findall(r"(?m)^ *[-+] .*$", TEXT)

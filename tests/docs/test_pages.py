"""The pages say what is so: programs run, commands are accepted, links lead somewhere."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from metadist.cli.commands import COMMANDS
from metadist.tasks import check_sampler

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")])
PAGES = [page for page in PAGES if page.parent != ROOT / "docs" / "algorithms"]  # generated
FREE = ("|", "    ", "<!--- ")  # tables, commands, comments
ALGORITHMS = (ROOT / "docs" / "algorithms.md").read_text()


def programs(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def headings(page):
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"(?s)```.*?```", "", page.read_text())
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands():
    """The commands of all pages that need no file of another command, as (page, words)."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?m)^    metadist ([a-z].*?)(?: +#.*)?$", text):
            if "--config runs/" not in line:
                yield page.name, shlex.split(line)


@pytest.fixture
def my_tasks(tmp_path, monkeypatch):
    """The module my_tasks.py of docs/tasks.md, in a folder of its own."""
    (tmp_path / "my_tasks.py").write_text(programs("docs/tasks.md")[0])
    monkeypatch.syspath_prepend(tmp_path)


def test_the_algorithms_page_is_what_the_script_writes():
    page = runpy.run_path(str(ROOT / "scripts" / "docs_algorithms.py"))["page"]
    assert page(ALGORITHMS) == ALGORITHMS, "run .venv/bin/python scripts/docs_algorithms.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_outside_of_tables_and_commands(page):
    lines = page.read_text().splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith(FREE)]


def test_no_line_is_a_bullet_by_accident():
    assert not re.findall(r"(?m)^ *[-+] .*$", ALGORITHMS)


def test_the_stream_of_the_docs_is_one(tmp_path, monkeypatch):
    (tmp_path / "my_stream.py").write_text(programs("docs/tasks.md")[2])
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_stream")
    assert check_sampler(module.Drift(), 2, processes=False, allow_equal_examples=True)
    assert len(module.Drift().sample_at(0, 9).support.index) == 24


@pytest.mark.parametrize(("page", "words"), list(commands()), ids=str)
def test_commands_are_accepted(page, words, my_tasks, monkeypatch):
    monkeypatch.chdir(ROOT)
    command, *options = words
    assert command in COMMANDS
    importlib.import_module(f"metadist.cli.{command.replace('-', '_')}").parser().parse_args(
        options
    )

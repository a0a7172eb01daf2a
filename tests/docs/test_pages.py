"""The pages say what is so: programs run, commands are accepted, links lead somewhere."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest

from metadist.cli import train
from metadist.tasks import check_sampler

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ALGORITHMS = (ROOT / "docs" / "algorithms.md").read_text()


def programs(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def headings(page):
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"(?s)```.*?```", "", page.read_text())
    titles = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def train_commands():
    """The `metadist train` commands of all pages, as (page, options)."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for options in re.findall(r"(?m)^    metadist train (.*?)(?: +#.*)?$", text):
            if "--config runs/" not in options:  # written by another command
                yield page.name, options


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
    assert not [line for line in lines if len(line) > 100 and not line.startswith(("|", "    "))]


def test_no_line_is_a_bullet_by_accident():
    assert not re.findall(r"(?m)^ *[-+] .*$", ALGORITHMS)


def test_the_program_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (program,) = programs("README.md")
    monkeypatch.chdir(tmp_path)
    assert program.count("fit(300)") == program.count("num_tasks=600") == 1
    exec(program.replace("fit(300)", "fit(2)").replace("num_tasks=600", "num_tasks=4"), {})
    assert re.search(r"(?m)^0\.\d+ \+- 0\.\d+$", capsys.readouterr().out)
    assert (tmp_path / "runs" / "first" / "events.jsonl").exists()


def test_a_sampler_of_your_own_is_checked(my_tasks, capsys):
    exec(programs("docs/tasks.md")[1], {})
    assert "Blobs" in capsys.readouterr().out


def test_what_was_trained_is_used_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = programs("docs/running.md")
    exec(program.replace("fit(5)", "fit(1)"), {})
    assert (tmp_path / "letters.pt").exists()


def test_the_stream_of_the_docs_is_one(tmp_path, monkeypatch):
    (tmp_path / "my_stream.py").write_text(programs("docs/tasks.md")[2])
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_stream")
    assert check_sampler(module.Drift(), 2, processes=False, allow_equal_examples=True)
    assert len(module.Drift().sample_at(0, 9).support.index) == 24


@pytest.mark.parametrize(("page", "options"), list(train_commands()))
def test_commands_are_accepted(page, options, my_tasks, monkeypatch):
    monkeypatch.chdir(ROOT)
    train.parser().parse_args(shlex.split(options))

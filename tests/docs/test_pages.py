"""The pages say what is so: programs run, commands are accepted, links lead somewhere."""

import importlib
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

from metadist.cli import comparing, train, tune
from metadist.cli.commands import COMMANDS
from metadist.cli.parsing import read_yaml
from metadist.cli.train import parse_training
from metadist.cluster import Workers
from metadist.cluster.jobs.tune import plan
from metadist.compare.plan import Comparison
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


def lines_of(page):
    """The shell lines of a page, without their comments; those of programs are among them."""
    text = page.read_text().replace("\\\n", " ")
    return re.findall(r"(?m)^    (\S.*?)(?: +#.*)?$", text)


def commands():
    """The `metadist` commands of all pages, as (page, words)."""
    for page in PAGES:
        for line in lines_of(page):
            # What a job of Ray is given are options of `metadist train`.
            line = re.sub(r"^ray submit \S+ train.py -- ", "metadist train ", line)
            # A config that another command has written is one like ours.
            line = re.sub(r"--config runs/\S+", "--config scripts/demo.yaml", line)
            if re.match(r"metadist [a-z-]+( |$)", line):
                yield page.name, shlex.split(line)[1:]


def scripts():
    """The programs of this repository that pages call, as (page, words)."""
    for page in PAGES:
        for line in lines_of(page):
            line = re.sub(r"^(\.venv/bin/)?python (?=\w+/)", "", line)
            if re.match(r"(scripts|examples)/\S+( -|$| \w+/| measure| waiting)", line):
                yield page.name, shlex.split(line)


def configs():
    """The YAML blocks of all pages, as (page, text)."""
    for page in PAGES:
        for text in re.findall(r"(?m)^```ya?ml\n((?s:.*?))^```", page.read_text()):
            yield page.name, text


@pytest.fixture
def my_tasks(tmp_path, monkeypatch):
    """The module my_tasks.py of docs/tasks.md, in a folder of its own."""
    (tmp_path / "my_tasks.py").write_text(programs("docs/tasks.md")[0])
    monkeypatch.syspath_prepend(tmp_path)


def test_the_algorithms_page_is_what_the_script_writes():
    page = runpy.run_path(str(ROOT / "scripts" / "docs_algorithms.py"))["page"]
    assert page(ALGORITHMS) == ALGORITHMS, "run .venv/bin/python scripts/docs_algorithms.py"


def test_the_table_of_the_core_has_every_file_once_and_imports_lead_down():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"(?m)^\|.*", page.partition("| line |")[2])
    lines = [re.findall(r"`(\w+)(?:\.py|/)`", row) for row in rows]
    floor = {name: number for number, names in enumerate(lines) for name in names}
    assert len(floor) == sum(map(len, lines))
    core = ROOT / "metadist"
    found = {path.stem for path in core.iterdir() if not path.is_symlink()}
    assert found - {"__init__", "__main__", "__pycache__", "exports", "py"} == floor.keys()
    for path in core.glob("*.py"):
        for name in re.findall(r"(?m)^from metadist\.(\w+)", path.read_text()):
            is_lower = floor.get(name, 0) >= floor.get(path.stem, 0)
            assert is_lower or name == "checks", f"{path.name} imports {name}"


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


@pytest.mark.parametrize(("page", "text"), list(configs()), ids=str)
def test_configs_are_accepted(page, text, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    tree = read_yaml(str(file))
    if "entries" in tree:
        comparison = Comparison.of(tree)
        for run in [run for entry in comparison.entries for run in comparison.runs(entry)]:
            parse_training({**run.options, "run_dir": "x"}, run.values, comparing.OWN)
    elif "space" in tree:
        options = {name: value for name, value in tree.items() if name not in tune.OWN}
        parse_training(options, {})
        tune._check_names(options, tree["space"])
        plan(
            tree["space"],
            workers=Workers(num_workers=4),
            seed=0,
            **{name: tree[name] for name in ("num_steps", *tune.OWN[1:]) if name in tree},
        )
    else:
        train.parser().parse_args(["--config", str(file), "--run_dir", "x"])


def test_configs_are_found():
    assert {page for page, _ in configs()} == {"compare.md", "language_models.md"}
    unfenced = r"(?m)^    (sampler|problem|algorithm|num_steps|meta_batch_size): "
    plain = {page.name: re.sub(r"(?s)```.*?```", "", page.read_text()) for page in PAGES}
    assert not [name for name, text in plain.items() if re.search(unfenced, text)]


@pytest.mark.parametrize(("page", "words"), list(scripts()), ids=str)
def test_scripts_are_there_and_know_their_options(page, words):
    script = ROOT / words[0]
    assert script.is_file()
    assert script.suffix == ".py" or os.access(script, os.X_OK)
    ours = words[: words.index("--")] if "--" in words else words
    if re.search(r'"\$@"', script.read_text()) is None:  # hands them on
        for option in [word for word in ours[1:] if word.startswith("--") and word != "--help"]:
            assert option.removeprefix("--") in script.read_text()


def test_scripts_are_found():
    named = {words[0] for _, words in scripts()}
    assert {"scripts/demo", "scripts/docs", "scripts/experiments/nas_fashion.py"} <= named


def test_extras_that_are_installed_are_extras():
    listed = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    known = re.findall(r"(?m)^(\w+) = \[", listed.partition("\n[")[0])
    named = set()
    for page in PAGES:
        for found in re.findall(r"(?:metadist|-e '?\.)\[([\w,]+)\]", page.read_text()):
            named |= set(found.split(","))
    assert named and named <= set(known)

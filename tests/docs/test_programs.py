"""Every Python program of the pages runs, or says in its source why it does not.

A comment that GitHub and the site do not show stands before a program:

    <!--- skip: next "needs a GPU" -->
    <!--- smaller: fit(300) -> fit(2), num_tasks=600 -> num_tasks=4 -->

The programs of a page run one after another and share their names. One that begins with the comment
`# file.py` is written to that file too, and can be imported by those below. Programs of notebooks
run when the site is built.
"""

import ast
import builtins
import re
from pathlib import Path
from unittest import SkipTest

import pytest

sybil = pytest.importorskip("sybil")
from sybil.parsers.markdown import CodeBlockParser, SkipParser  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHRINKING = re.compile(r"<!--- smaller: (.*?) -->\n```python\n")
FILE = re.compile(r"# (\w+\.py)\n")
SAYS = {  # what the output of a page must have
    "README.md": r"(?m)^0\.\d+ \+- 0\.\d+$",
    "tasks.md": "Blobs",
    "problems.md": r"(?s)({.*){7}",
    "learn2learn.md": "query_accuracy",
    "betty.md": "test_accuracy",
    "torchopt.md": "cosine",
}
WRITES = {"README.md": "runs/first/events.jsonl", "running.md": "letters.pt"}


def pages():
    """The pages with programs that do not run elsewhere."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/*.md")]
    for page in sorted(found):
        is_generated = page.parent == ROOT / "docs" / "algorithms"
        if not is_generated and "```py" in page.read_text():
            yield page


def run(example):
    """Run one program in the namespace of its page."""
    program = str(example.parsed)
    before = example.document.text[: example.start] + "```python\n"
    shrinking = [found for found in SHRINKING.finditer(before) if found.end() == len(before)]
    for replacement in re.split(r", (?=\S.* -> )", shrinking[0][1]) if shrinking else ():
        old, _, new = replacement.partition(" -> ")
        assert program.count(old) == 1, f"{old!r} must be in the program once"
        program = program.replace(old, new)
    if name := FILE.match(program):
        Path(name[1]).write_text(program)
    code = compile("\n" * example.line + program, example.path, "exec")
    exec(code, example.namespace)


@pytest.mark.filterwarnings("ignore:these outer variables got no hypergradient")
@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.name)
def test_programs_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    parsers = [CodeBlockParser("python", run), SkipParser()]
    document = sybil.Sybil(parsers).parse(page)
    reasons = []
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as reason:
            reasons.append(str(reason))
    assert all(len(reason) > 10 for reason in reasons)
    out = capsys.readouterr().out
    assert re.search(SAYS.get(page.name, ""), out), out
    assert (tmp_path / WRITES.get(page.name, "")).exists()


def test_a_program_that_is_skipped_says_why():
    for page in pages():
        for comment in re.findall(r"<!--- skip: (.*?) -->", page.read_text()):
            assert re.fullmatch(r'next "[^"]{10,}"', comment), (page.name, comment)


@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.name)
def test_no_program_hides_in_an_indented_block(page):
    """Sphinx and this test would not see that it is Python."""
    assert "```py\n" not in page.read_text(), "write ```python"
    text = re.sub(r"(?s)```.*?```", "", page.read_text())
    assert not re.findall(r"(?m)^    (?:from \w+ import|import \w|trainer\.|trainer = ).*$", text)


def missing_names(program):
    """The names that a program takes from elsewhere."""
    known, used = {"__file__", *dir(builtins)}, set()
    for node in ast.walk(ast.parse(program)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                known.add(name)
            case ast.arg(arg=name):
                known.add(name)
            case ast.alias(name=name, asname=other):
                known.add(other or name.partition(".")[0])
    return used - known


def test_the_programs_of_a_section_stand_alone():
    """Other pages lead to sections, and nobody reads those before."""
    missing = {}
    for page in pages():
        if page.parent.name == "migration" or page.name == "language_models.md":
            continue  # programs of other libraries, and one that grows from section to section
        for section in re.split("(?m)^## ", page.read_text()):
            programs = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
            if names := missing_names("\n".join(programs)):
                missing[f"{page.name}: {section.partition(chr(10))[0]}"] = names
    assert not missing

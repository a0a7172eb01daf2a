"""scripts/gpu runs to its end where there is no GPU, and prints what docs/gpu.md takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )


@pytest.mark.slow
def test_every_section_runs_on_a_cpu_and_prints_a_table():
    # `correctness` is below, and `ray` takes a cluster.
    sections = ("ceilings", "repeat", "speed", "graphs", "precision", "scaling", "plane", "trainer")
    ended = run("--only", *sections)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for section in sections:
        begin = ended.stdout.index(f"### {section}: ")
        head, line, *rows = ended.stdout[begin:].split("\n\n")[1].splitlines()
        assert rows, section
        assert {row.count("|") for row in (head, line, *rows)} == {head.count("|")}, section
    assert "OTHER" not in ended.stdout and "nan" not in ended.stdout


def test_what_begins_too_late_is_left_out_and_named():
    ended = run("--only", "plane", "--seconds", "-1")
    assert ended.returncode == 1
    assert "### plane: left out, for -1 seconds are over" in ended.stdout


@pytest.mark.slow
def test_each_test_of_the_card_is_counted_and_what_is_printed_is_written(tmp_path):
    ended = run("--only", "correctness", "--out", str(tmp_path / "gpu.md"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    module = (ROOT / "tests" / "gpu" / "test_card.py").read_text()
    (num_skipped,) = re.findall(r"in all \| (\d+) skipped \|", ended.stdout)
    assert int(num_skipped) > 2 * module.count("def test_")
    assert (tmp_path / "gpu.md").read_text() == ended.stdout

"""The page of a run or a comparison says what the folder says, loads nothing, and is safe."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.algorithms import ITD
from metadist.cli import main
from metadist.compare import Comparison
from metadist.loggers import CSVLogger
from metadist.report import comparison_page, run_page
from metadist.report.charts import Curve, histogram, line_chart
from metadist.report.of_run import UNMOVED
from metadist.report.page import escaped, table
from metadist.run.events import EventLog
from metadist.run.files import RESULT
from metadist.run.storage import Folder, write_json
from metadist.tasks import ProtoNet
from tests.helpers import Images, images_of_conv4, make_trainer, small_conv4

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The text of a page and its elements; every element is closed where it must be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def require_alone(page: str) -> None:
    """Nothing in it is loaded from anywhere, and no script runs."""
    for tag, attributes in Page(page).elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value is not None and value.startswith(("data:image/png;base64,", "#"))
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import", page)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A classification in 6 steps, validated three times, tested, with a dropped task."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    trainer = make_trainer(
        **images_of_conv4(),
        val_sampler=Images(),
        val_every=2,
        val_tasks=3,
        run_dir=folder,
        log_every=1,
    )
    result = trainer.fit(6)
    EventLog(folder / "events.jsonl").write("task_dropped", tasks=[3, 7])
    tested = trainer.test(Images(), 3)
    trainer.record("test", tested)
    summary = {"num_steps": 6, "seconds": result.seconds, "settings": trainer.settings()}
    test = {"checkpoint": "step-00000006", **tested.to_json()}
    write_json(folder / RESULT, {**summary, "test": test})
    return folder


def test_a_baseline_without_an_inner_loop_says_why_nothing_moves(finished, tmp_path):
    assert UNMOVED not in run_page(finished)
    trainer = make_trainer(
        problem=ProtoNet(small_conv4()),
        sampler=Images(),
        val_sampler=Images(),
        val_tasks=3,
        run_dir=tmp_path / "run",
        algorithm=ITD(inner_steps=1, inner_lr=0.1),
    )
    trainer.fit(2)
    assert UNMOVED in run_page(tmp_path / "run")
    assert trainer.test(Images(), 3).headline.endswith(" (the same before adaptation)")


def test_a_finished_run_on_one_page(finished):
    page = run_page(finished)
    require_alone(page)
    assert len(page.encode()) < 2_000_000
    found = Page(page)
    tested = json.loads((finished / RESULT).read_text())["test"]["metrics"]["query_accuracy"]
    for part in (
        "Run mine finished",
        "6 of 6 outer steps",
        f"{tested['mean']:.4g} ± {tested['half_width']:.2g} test accuracy",
        "tasks dropped, whose hypergradient was not finite 2",
        "interval 95 % Student t over tasks",
        "meta_batch_size 4",
        f"test accuracy {tested['mean']:.4g} {tested['half_width']:.2g} 6 ",
        f"torch {torch.__version__}",
        f"metadist train --config {finished}/config.yaml --run_dir runs/again",
        "executor local",
    ):
        assert part in found.text, part
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        *("Results", "Curves", "Sample tasks", "Adaptation", "What happened", "Protocol"),
        *("Settings", "Environment", "Files and how to repeat it"),
    ]
    assert [tag for tag, _ in found.elements].count("img") == 3
    labels = [a["aria-label"] for tag, a in found.elements if tag == "svg" and "aria-label" in a]
    assert labels[0] == (
        "accuracy against outer step: training, training before adaptation, validation, test"
    )
    assert "loss against outer step" in str(labels[1])


def test_the_command_writes_it_into_the_folder_or_elsewhere(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert main(["report", str(copy)]) == 0
    assert "Run copy" in (copy / "report.html").read_text()
    assert main(["report", str(copy), "--output", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").is_file()
    assert re.search(r"mine\.html: \d+ kB", capsys.readouterr().out)
    assert main(["report", str(copy), "--output", str(tmp_path)]) == 2
    assert "output must be a file, got the folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "run_dir must be the folder of a run" in capsys.readouterr().err


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[2J\u202e&amp;"


def test_no_text_of_a_folder_becomes_markup(finished, tmp_path):
    copy = tmp_path / "<b>bold"
    shutil.copytree(finished, copy)
    result = json.loads((copy / RESULT).read_text())
    result["settings"] = {HOSTILE: HOSTILE}
    result["test"]["protocol"] = {HOSTILE: HOSTILE}
    result["test"]["metrics"] = {HOSTILE: {"mean": 1.0, "half_width": HOSTILE}}
    write_json(copy / RESULT, result)
    (copy / "config.yaml").write_text(HOSTILE)
    log = EventLog(copy / "events.jsonl")
    log.write("run_failed", error=HOSTILE)
    log.write(HOSTILE, words=[HOSTILE], **{HOSTILE: HOSTILE})
    trainer = make_trainer(run_dir=tmp_path / "other", log_every=1)

    def on_step(report: Any) -> bool:
        trainer.log({HOSTILE: 1.0}, HOSTILE)
        return True

    trainer.fit(2, on_step)
    for folder in (copy, tmp_path / "other"):
        page = run_page(folder)
        require_alone(page)
        assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
        assert "&lt;script&gt;" in page


def test_a_running_run_and_one_without_anything_yet(tmp_path):
    pages = []

    def on_step(report: Any) -> bool:
        if report.step.version == 2:
            pages.append(run_page(tmp_path))
        return True

    make_trainer(run_dir=tmp_path, log_every=1).fit(3, on_step)
    require_alone(pages[0])
    assert "running" in Page(pages[0]).text
    assert "missing: result.json" not in Page(pages[0]).text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("events", "events.jsonl has 1 lines that are no events"),
        ("no events", "missing: events.jsonl: what happened, and the environment"),
        ("no tensorboard", "missing: tensorboard: curves and pictures"),
        ("tensorboard", " damaged"),
        ("result", "result.json is no JSON object"),
        ("no config", "missing: config.yaml: the options of the run"),
        ("checkpoint", "checkpoint step-00000006 is damaged"),
    ],
)
def test_a_damaged_run_is_shown_with_what_is_missing(finished, tmp_path, damage, said):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    events = sorted((copy / "tensorboard").iterdir())
    if damage == "events":
        text = (copy / "events.jsonl").read_text()
        (copy / "events.jsonl").write_text(f"\0\0\0\n{text}")
    elif damage == "no events":
        (copy / "events.jsonl").unlink()
    elif damage == "no tensorboard":
        shutil.rmtree(copy / "tensorboard")
    elif damage == "tensorboard":
        data = events[0].read_bytes()
        events[0].write_bytes(data[:3000] + bytes(2000) + data[5000:])
    elif damage == "result":
        (copy / RESULT).write_text("{'half")
    elif damage == "no config":
        (copy / "config.yaml").unlink()
    else:
        (copy / "checkpoints" / "step-00000006" / "tensors.safetensors").write_bytes(b"")
    page = run_page(copy)
    require_alone(page)
    missing = page.partition("<h2>Missing or damaged</h2>")[2]
    assert said in Page(f"<div>{missing.partition('</section>')[0]}</div>").text


def test_values_that_are_no_numbers_leave_holes():
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, float("inf")), (3.0, 2.0)]
    chart = line_chart([Curve("a", points)], "outer step", "loss")
    assert chart.count("<circle") == 2 and "nan" not in chart and "inf" not in chart
    assert line_chart([Curve("a", [(1.0, float("nan"))])], "x", "y") == ""
    assert line_chart([], "x", "y") == histogram([("a", [])], "x", "y") == ""
    flat = line_chart([Curve("a", [(1.0, 0.0)])], "x", "y")
    assert flat.count("<circle") == 1 and "nan" not in flat


def test_long_curves_are_thinned_by_means_and_say_so():
    points = [(float(step), float(step % 2)) for step in range(3000)]
    chart = line_chart([Curve("a", points)], "outer step", "loss")
    assert "a (means of 10 points)" in chart and len(chart) < 20_000


def test_axes_have_round_ticks_labels_and_a_logarithm_where_it_helps():
    chart = line_chart([Curve("a", [(0.0, 0.001), (100.0, 1.0)])], "seconds", "distance")
    found = Page(f"<div>{chart}</div>").text
    assert "distance, log scale" in found and "seconds" in found
    for tick in ("0.001", "0.01", "0.1", "20", "100"):
        assert f" {tick} " in f" {found} "
    linear = line_chart([Curve("a", [(0.0, -1.0), (10.0, 1.0)])], "steps", "y")
    assert "log scale" not in linear


def test_a_histogram_shows_shares_of_each_group():
    right = [(0.0, 0.1, 10.0), (0.9, 1.0, 30.0)]
    chart = histogram([("right", right), ("wrong", [(0.0, 0.1, 5.0)])], "weight", "share")
    assert chart.count('class="area') == 2 and "right" in chart and "wrong" in chart
    top = [float(value) for value in re.findall(r'class="end">([\d.]+)<', chart)]
    assert max(top) == 1.0  # all wrong ones lie in one bin


def test_escaping():
    assert escaped('<a href="x">\x00') == "&lt;a href=&quot;x&quot;&gt;\\x00"
    assert "<td class=num>&lt;1</td>" in table(["a", "b"], [["x", "<1"]])


@pytest.fixture(scope="module")
def comparison(tmp_path_factory) -> Path:
    """Two methods on two seeds, one grid, one run missing."""
    folder = tmp_path_factory.mktemp("compare")
    config: dict[str, Any] = {
        "entries": {"A": {}, "B": {"grid": {"algorithm.inner_lr": [0.1, 0.2]}}},
        "budget": {"steps": 4},
        "seeds": [0, 1, 2],
        "metric": "query_loss",
    }
    write_json(folder / "comparison.json", {"metadist": "0.1.0", "config": config})
    it = Comparison.of(config)
    best = it.runs("B")[1]
    runs = [*it.runs("A"), *it.runs("B"), *(best._replace(seed=seed) for seed in (1, 2))]
    for run in runs:
        if run.entry == "A" and run.seed == 2:
            continue
        lines = []
        for step in (1, 2, 3, 4):
            loss = (1.0 + 0.1 * run.seed + (run.entry == "A") - 0.5 * run.number) / step
            line: dict[str, Any] = {"step": step, "seconds": 2.0 * step, "gradients": 3.0 * step}
            metrics = {"query_loss": loss, "test_accuracy": 0.9}
            lines.append(json.dumps(line | {"calls": {}, "metrics": metrics, "traffic": {}}) + "\n")
        target = folder / run.name
        target.mkdir(parents=True)
        (target / "records.jsonl").write_text("".join(lines))
    (folder / "runs/A/seed-2").mkdir(parents=True)
    (folder / "runs/A/seed-2/error.txt").write_text(f"OSError: {HOSTILE}\n\ntrace")
    return folder


def test_a_comparison_on_one_page(comparison, tmp_path):
    page = comparison_page(comparison)
    require_alone(page)
    found = Page(page)
    assert "method query_loss query_loss at best seconds gradients" in found.text
    # Two seeds of A have no interval, three of B have.
    assert "A 0.5125 0.5125 8 12" in found.text
    assert "B (algorithm.inner_lr=0.2) 0.15 ± 0.062 0.15 ± 0.062 8 12" in found.text
    labels = [a["aria-label"] for tag, a in found.elements if tag == "svg" and "aria-label" in a]
    assert labels[:3] == [
        f"query_loss against {axis}: A, B"
        for axis in ("seconds of training", "outer steps", "oracle calls, in gradients")
    ]
    assert "runs/A/seed-2: OSError: <script>" in found.text
    assert "B algorithm.inner_lr=0.2 0.125 yes" in found.text
    assert main(["report", str(comparison), "--output", str(tmp_path / "page.html")]) == 0
    with pytest.raises(ValueError, match=r"run_dir must hold a comparison.json"):
        comparison_page(tmp_path)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_reader_clicks_through_the_pages(finished, comparison, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="there is no playwright")
    complaints: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            pages = {"light": run_page(finished), "dark": comparison_page(comparison)}
            for scheme, page in pages.items():
                tab = browser.new_page(color_scheme=scheme, viewport={"width": 1000, "height": 700})
                tab.on("console", lambda message: complaints.append(message.text))
                tab.on("request", lambda request: complaints.append(request.url))
                path = tmp_path / f"{scheme}.html"
                path.write_text(page)
                tab.goto(path.as_uri())
                links = tab.locator("nav a")
                for place in range(links.count()):
                    links.nth(place).click()
                    assert tab.url.endswith(f"#s{place}")
                    assert (
                        tab.locator(f"#s{place} h2").inner_text() == links.nth(place).inner_text()
                    )
                folded = tab.locator("details")
                for place in range(folded.count()):
                    assert not folded.nth(place).locator(":scope > :nth-child(2)").is_visible()
                    folded.nth(place).locator("summary").first.click()
                    assert folded.nth(place).locator(":scope > :nth-child(2)").is_visible()
                widths = "[document.documentElement.scrollWidth, innerWidth]"
                wide, screen = tab.evaluate(widths)
                assert wide <= screen
                tab.set_viewport_size({"width": 380, "height": 700})
                wide, screen = tab.evaluate(widths)
                assert wide <= screen
                tab.set_viewport_size({"width": 1000, "height": 700})
                colours = tab.evaluate(
                    "['color', 'backgroundColor'].map(n => getComputedStyle(document.body)[n])"
                )
                light = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in colours]
                assert (light[0] < 0.2 and light[1] > 0.9) == (scheme == "light")
                assert abs(light[0] - light[1]) > 0.7
        finally:
            browser.close()
    # The page itself and the pictures in it are all that is opened.
    assert [c for c in complaints if not c.startswith(("file://", "data:image/png"))] == []


def test_a_run_that_is_not_on_this_machine(tmp_path):
    uri = f"memory://{tmp_path}/far"
    trainer = make_trainer(run_dir=uri, loggers=[CSVLogger()], log_every=1)
    trainer.fit(2)
    page = run_page(uri)
    require_alone(page)
    assert "Run far finished" in Page(page).text and "loss against outer step" in page
    assert "metrics.csv" in Page(page).text
    assert main(["report", uri]) == 0
    assert Folder(uri).read("report.html", 1 << 21).startswith(b"<!DOCTYPE html>")
    resumed = make_trainer(run_dir=uri, loggers=[CSVLogger()], log_every=1)
    resumed.restore()
    resumed.fit(3)
    rows = Folder(uri).read("metrics.csv", 1 << 20).decode().splitlines()
    assert [row[0] for row in rows if ",loss/train," in row] == ["1", "2", "3"]

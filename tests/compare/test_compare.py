"""Comparisons: the budgets, what is continued and what is refused, tables and curves."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from metadist import CheckpointStore, LocalExecutor, OuterOptimizer, Trainer
from metadist.algorithms import AID, SOBA
from metadist.compare.metrics import kept_metrics, solution_metrics
from metadist.compare.plan import Comparison, Outcome, Run, differences, merge
from metadist.compare.report import AXES, curves, rows, to_csv, to_markdown
from metadist.compare.run import Budget, Contender, Record, Spent, read_records, run_on_budget
from metadist.oracle import in_gradients
from metadist.run.storage import Folder
from metadist.tasks import FixedTasks
from tests.helpers import becomes, contents, finish, start
from tests.problems import Quadratic, quadratic_task, quadratic_terms, true_hypergradient

MINE = """
import torch
from tests.problems import Quadratic, quadratic_task

class Data:
    num_tasks = 1
    def __init__(self, seed: int = 0):
        self.seed = seed
    def sample(self, index):
        return quadratic_task(self.seed)._replace(id=index)
    def solution_metrics(self, problem, outer, inner):
        return {"test_error": float((inner["y"] - 1).abs().mean())}

class Faulty(Data):
    def sample(self, index):
        raise OSError("the disk is gone")

class Hyper(Quadratic):
    def __init__(self):
        super().__init__(2, 4)
"""

CONFIG: dict[str, Any] = {
    "problem": "mine.Hyper",
    "sampler": "mine.Data",
    "outer_optimizer": {"name": "sgd", "lr": 0.05},
    "budget": {"steps": 12},
    "seeds": [0, 1],
    "evaluations": 4,
    "entries": {
        "AID": {
            "algorithm": {
                "class_path": "aid",
                "init_args": {"inner_steps": 5, "inner_lr": 0.3, "adjoint_steps": 4},
            }
        },
        "SOBA": {
            "algorithm": {"class_path": "soba", "init_args": {"inner_lr": 0.1}},
            "batch_size": 2,
            "outer_optimizer": {"lr": 0.01},
        },
    },
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own, which holds `mine.py`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("mine", None)


def write(changes: dict[str, Any] | None = None, name: str = "config.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(merge(CONFIG, changes or {}), sort_keys=False))
    return name


def compare(cli, *flags: str | int, folder: str = "out", changes: dict[str, Any] | None = None):
    return cli("compare", write(changes), "--run_dir", folder, "--plots", "false", *flags)


def table(folder: str = "out") -> list[dict[str, str]]:
    return read_csv(Path(folder, "table.csv"))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def results(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def timeless(folder: str = "out") -> list[dict[str, Any]]:
    """The results without what a clock says."""
    return [{**result, "seconds": None} for result in results(folder)]


# From the command line


def test_a_comparison_ends_with_tables_and_curves(cli):
    out = cli.good("compare", write({"log_every": 1}), "--run_dir", "out")
    assert "runs/AID/seed-0: 12 steps, " in out and "runs/SOBA/seed-1: 12 steps, " in out
    found = results()
    assert [r["step"] for r in found if (r["entry"], r["seed"]) == ("AID", 1)] == [1, 3, 6, 9, 12]
    aid, soba = table()
    assert [row["entry"] for row in (aid, soba)] == ["AID", "SOBA"]
    assert (aid["runs"], aid["steps"], aid["errors"]) == ("2", "12.0", "")
    # Of one step: 5 gradients, 1 of f, 4 products and J v; SOBA's draws are 2 of 3 and 2 of 2.
    assert (aid["calls inner_grad"], aid["calls outer_grads"]) == ("60.0", "12.0")
    assert float(soba["gradients"]) == pytest.approx(12 * ((1 + 2) * 2 / 3 + 1))
    last = [r["metrics"] for r in found if r["entry"] == "AID" and r["step"] == 12]
    mean = sum(metrics["query_loss"] for metrics in last) / 2
    assert float(aid["query_loss"]) == pytest.approx(mean)
    assert float(aid["query_loss +-"]) > 0
    assert float(aid["query_loss at best"]) <= mean
    assert 0 < float(aid["adjoint_residual"]) < 1
    assert float(aid["test_error"]) > 0
    markdown = Path("out/table.md").read_text()
    # An interval of two seeds says nothing.
    assert re.search(r"\| AID \|  \| 2 \| [-\d.e]+ \| [-\d.e]+ \|", markdown)
    assert markdown.splitlines()[2] == (
        "| entry | query_loss | query_loss at best | seconds | gradients |"
    )
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines[:4]} == {lines[0].count("|")}
    for name in ("query_loss", "support_loss", "test_error"):
        assert Path("out", f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_redoes_nothing(cli, here):
    compare(cli)
    before = contents(here / "out" / "runs")
    tables = Path("out/table.csv").read_text()
    code, out, _ = compare(cli)
    assert code == 0 and "runs/AID/seed-0: 12 steps" in out
    assert contents(here / "out" / "runs") == before
    assert Path("out/table.csv").read_text() == tables


def test_seeds_and_entries_may_be_added(cli, here):
    compare(cli, changes={"seeds": [0], "entries": {}})
    before = contents(here / "out" / "runs" / "AID" / "seed-0")
    other = {"Other": {"algorithm": {"class_path": "aid", "init_args": {"inner_lr": 0.2}}}}
    code, _, err = compare(cli, changes={"entries": other})
    assert code == 0, err
    assert [(row["entry"], row["runs"]) for row in table()] == [
        ("AID", "2"),
        ("SOBA", "2"),
        ("Other", "2"),
    ]
    assert contents(here / "out" / "runs" / "AID" / "seed-0") == before


def test_a_changed_config_is_refused_with_the_difference(cli, here):
    few = {"seeds": [0, 1], "budget": {"steps": 12}, "evaluations": 1}
    assert compare(cli, changes=few)[0] == 0
    before = contents(here / "out")
    for changes, message in (
        ({"budget": {"steps": 13}}, "budget.steps was 12, is 13"),
        ({"seeds": [1, 0]}, "seeds was [0, 1], is [1, 0]"),
        ({"compute": {"num_threads": 2}}, "compute.num_threads was None, is 2"),
        (
            {"entries": {"SOBA": {"outer_optimizer": {"lr": 0.02}}}},
            "entries.SOBA.outer_optimizer.lr was 0.01, is 0.02. Choose another folder",
        ),
    ):
        code, out, err = compare(cli, changes={**few, **changes})
        assert (code, out) == (2, "")
        assert f"metadist compare: error: run_dir 'out' is of another config: {message}" in err
        assert contents(here / "out") == before


def test_options_may_take_the_seed(cli):
    entries = {"AID": CONFIG["entries"]["AID"]}
    tree = {**CONFIG, "entries": entries, "budget": {"steps": 1}, "evaluations": 1}
    for folder, changes in (("same", {}), ("own", {"seeded": ["sampler.seed"]})):
        Path("config.yaml").write_text(yaml.safe_dump({**tree, **changes}))
        cli.good("compare", "config.yaml", "--run_dir", folder, "--plots", "false")
    (same, own) = table("same"), table("own")
    assert float(same[0]["support_loss +-"]) > 0  # of another start of x
    one, other = (
        yaml.safe_load(Path(f"own/runs/AID/seed-{seed}/run/config.yaml").read_text())
        for seed in (0, 1)
    )
    assert [c["sampler"]["init_args"]["seed"] for c in (one, other)] == [0, 1]
    assert [c["seed"] for c in (one, other)] == [0, 1]
    assert own[0]["support_loss +-"] != same[0]["support_loss +-"]


def test_a_failed_run_does_not_stop_the_others(cli):
    changes = {"entries": {"AID": {"sampler": "mine.Faulty"}}}
    code, out, _ = compare(cli, changes=changes)
    assert code == 1
    assert re.search("runs/AID/seed-0: failed: SamplerError: .*the disk is gone", out)
    aid, soba = table()
    assert (aid["runs"], soba["runs"]) == ("0", "2")
    assert re.search("runs/AID/seed-1: SamplerError: .*the disk is gone", aid["errors"])
    assert "\n* runs/AID/seed-0: SamplerError: " in Path("out/table.md").read_text()
    assert "Traceback" in Path("out/runs/AID/seed-0/error.txt").read_text()
    # Mended, it is run; the others are not run again.
    source = Path("mine.py").read_text().replace('raise OSError("the disk is gone")', "return None")
    Path("mine.py").write_text(source.replace("return None", "return super().sample(index)"))
    sys.modules.pop("mine")
    assert compare(cli, changes=changes)[0] == 0
    assert [row["runs"] for row in table()] == ["2", "2"]
    assert not Path("out/runs/AID/seed-0/error.txt").exists()


def test_a_grid_is_tried_with_the_first_seed_and_the_best_point_runs_with_all(cli):
    grid = {"outer_optimizer.lr": [0.0001, 0.05, 1e6], "algorithm.inner_steps": [2, 5]}
    changes = {"entries": {"AID": {"grid": grid}}, "seeds": [3, 4]}
    code, out, _ = compare(cli, changes=changes)
    assert code == 0, out
    tried = read_csv(Path("out/grid.csv"))
    assert [json.loads(row["point"]) for row in tried][1] == {
        "outer_optimizer.lr": 0.0001,
        "algorithm.inner_steps": 5,
    }
    assert {row["seed"] for row in tried} == {"3"} and len(tried) == 6
    scores = [float(row["query_loss"] or "inf") for row in tried]
    (best,) = [number for number, row in enumerate(tried) if row["chosen"]]
    assert scores[best] == min(scores) and scores[best] < max(scores)
    assert not Path(f"out/runs/AID/point-{1 - min(best, 1)}/seed-4").exists()
    assert Path(f"out/runs/AID/point-{best}/seed-4/records.jsonl").exists()
    aid, _ = table()
    assert aid["runs"] == "2"
    point = json.loads(tried[best]["point"])
    assert aid["point"] == ", ".join(f"{name}={value}" for name, value in point.items())


def test_a_grid_without_a_finite_metric_is_a_failure(cli):
    source = Path("mine.py").read_text().replace("float((inner", "float('nan') * float((inner")
    Path("mine.py").write_text(source.replace("test_error", "distance"))
    entries = {"AID": {**CONFIG["entries"]["AID"], "grid": {"algorithm.inner_steps": [2, 5]}}}
    Path("config.yaml").write_text(
        yaml.safe_dump({**CONFIG, "entries": entries, "metric": "distance"})
    )
    code, out, _ = cli("compare", "config.yaml", "--run_dir", "out", "--plots", "false")
    assert code == 1
    assert "failed: runs/AID/point-1/seed-0: distance is not finite" in out
    assert table()[0]["runs"] == "0"


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_results(cli, here):
    steps = {"budget": {"steps": 80}, "evaluations": 40, "seeds": [0]}
    config = write(steps)
    process = start(["-m", "metadist", "compare", config, "--run_dir", "out"], here)
    second = here / "out" / "runs" / "SOBA" / "seed-0" / "records.jsonl"
    assert becomes(lambda: second.exists() and len(second.read_text().splitlines()) >= 3, 300)
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    first = here / "out" / "runs" / "AID" / "seed-0"
    done = contents(first)
    begun = second.read_text().splitlines()
    assert 3 <= len(begun) < 41
    assert compare(cli, changes=steps)[0] == 0
    assert contents(first) == done
    # The evaluations before it was killed are not made again.
    assert second.read_text().splitlines()[: len(begun) - 1] == begun[:-1]
    assert compare(cli, folder="whole", changes=steps)[0] == 0
    assert timeless() == timeless("whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": {"steps": 3, "seconds": 1}}, "budget must have exactly one of seconds, steps"),
        ({"budget": {"steps": 0}}, "budget.steps must be an integer > 0, got 0"),
        ({"budget": {"steps": None, "seconds": "1h"}}, "budget.seconds must be a number > 0"),
        ({"seeds": []}, r"seeds must be a list of different integers >= 0, got \[\]"),
        ({"seeded": "sampler.seed"}, "seeded must be a list of options, got 'sampler.seed'"),
        ({"seeded": 3}, "seeded must be a list of options, got 3"),
        ({"seeded": ["sampler.sea"]}, "entry AID: sampler.sea is no option of Data. It has seed"),
        ({"seeds": [1, 1]}, "seeds must be a list of different integers"),
        ({"evaluations": 0}, "evaluations must be an integer >= 1, got 0"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"metric": "test_error"}, "metric must not be one of test data, got 'test_error'"),
        ({"entries": {"a/b": {}}}, "names of entries must be of letters"),
        (
            {"entries": {"AID": {"seed": 3}}},
            "entry AID must not have the option seed: give `seeds`",
        ),
        ({"num_steps": 3}, "a comparison must not have the option num_steps: give `budget`"),
        ({"entries": {"AID": {"grid": {"x": 3}}}}, "grid of entry AID must map options to lists"),
        ({"entries": {"AID": {"batch_size": "many"}}}, "entry AID: .*batch_size"),
        (
            {"entries": {"AID": {"grid": {"algorithm.inner_speed": [1]}}}},
            r"entry AID at \{'algorithm.inner_speed': 1\}: .*inner_speed",
        ),
        ({"keep_state": False}, "entry AID: val_split or val_sampler must be given, got neither"),
        (
            {"val_split": "val"},
            "entry AID: val and test samplers must not be given with keep_state",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(cli, changes, message):
    code, out, err = compare(cli, changes=changes)
    assert code == 2 and out == ""
    assert re.search("metadist compare: error: config.yaml: " + message, err, re.DOTALL), err
    assert not Path("out").exists()


MAML = """
from torch import nn
from metadist.tasks import FewShotProblem
from tests.helpers import curves

class Net(FewShotProblem):
    def __init__(self):
        super().__init__(nn.Linear(1, 1), loss="mse")

class Three:
    def __init__(self):
        self.num_tasks = 3
    def sample(self, index):
        return curves().sample(index % 3)._replace(id=index)
"""


def test_a_learned_start_is_judged_on_new_tasks_though_the_set_is_fixed(cli):
    Path("maml.py").write_text(MAML)
    entry = {"algorithm": {"class_path": "itd", "init_args": {"inner_steps": 1}}}
    given = {"problem": "maml.Net", "sampler": "maml.Three", "entries": {"MAML": entry}}
    config = {**given, "budget": {"steps": 1}, "seeds": [0], "evaluations": 1, "val_tasks": 2}
    Path("maml.yaml").write_text(yaml.safe_dump(config))
    code, _, err = cli("compare", "maml.yaml", "--run_dir", "out")
    assert code == 2 and "entry MAML: val_split or val_sampler must be given" in err
    Path("maml.yaml").write_text(yaml.safe_dump({**config, "val_sampler": "maml.Three"}))
    code, out, err = cli("compare", "maml.yaml", "--run_dir", "out", "--plots", "false")
    assert code == 0 and "runs/MAML/seed-0: 1 steps" in out, err


def test_other_input_is_refused(cli, monkeypatch):
    for text in ("- 1", "a: [", "{}"):
        Path("bad.yaml").write_text(text)
        code, _, err = cli("compare", "bad.yaml", "--run_dir", "out")
        assert code == 2 and "metadist compare: error: " in err
    code, _, err = cli("compare", "none.yaml", "--run_dir", "out")
    assert code == 2 and "config must be a YAML file of options, got 'none.yaml'" in err
    assert "num_workers must be >= 1, got 0" in compare(cli, "--workers.num_workers", 0)[2]
    ray = {"executor": "ray"}
    assert (
        "executor must be local with num_workers=2"
        in (compare(cli, "--workers.num_workers", 2, changes=ray)[2])
    )
    assert not Path("out").exists()
    Path("full").mkdir()
    Path("full/thesis.txt").touch()
    assert "run_dir must be new, empty, or hold comparison.json" in compare(cli, folder="full")[2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = cli("compare", write(), "--run_dir", "out")
    assert code == 2 and "plots must be false without matplotlib, got true: pip install" in err


def test_an_unknown_metric_is_noticed_at_the_first_evaluation(cli):
    code, out, _ = compare(cli, changes={"metric": "accuracy"})
    assert code == 1
    assert (
        "metric must be one of query_loss, support_loss, test_error, adjoint_residual, got" in out
    )
    assert not Path("out/runs/AID/seed-0/records.jsonl").exists()


# Budgets


def contender(run_dir: str, **options: Any) -> Contender:
    chosen: dict[str, Any] = {
        "algorithm": SOBA(inner_lr=0.1),
        "outer_optimizer": OuterOptimizer("sgd", lr=0.01),
        "quiet": True,
        "run_dir": run_dir,
        "checkpoint_every": 10**9,
    }
    sampler = FixedTasks([quadratic_task(0)])
    trainer = Trainer(Quadratic(2, 4), sampler, **chosen | options)
    return Contender(trainer, lambda: kept_metrics(trainer))


def test_a_budget_of_calls_ends_a_run():
    # A step of SOBA: a gradient of g, one of f, H v and J v in one.
    records = run_on_budget(contender, Folder("run"), Budget(calls=30), 3)
    assert [record.spent.step for record in records] == [1, 3, 5, 8]
    assert [record.spent.gradients for record in records] == [4, 12, 20, 32]
    assert records[-1].spent.calls == {"inner_grad": 8, "outer_grads": 8, "hvp": 8, "jvp": 8}
    assert read_records(Folder("run")) == records


class Clock:
    """A clock that says how long the executor below took."""

    def __init__(self) -> None:
        self.now = 0.0


class Timed(LocalExecutor):
    """Its steps take 2 s of training and 1 s of drawing tasks, by their own account."""

    def run(self, until_version):
        for report in super().run(until_version):
            (result,) = report.results
            yield report._replace(seconds=3.0, results=(result._replace(sampling_s=1.0),))


def test_a_budget_of_seconds_is_of_training_alone(monkeypatch):
    monkeypatch.setattr("metadist.compare.run.perf_counter", iter(range(0, 10**6, 9)).__next__)
    records = run_on_budget(
        lambda run_dir: contender(run_dir, executor=Timed()), Folder("run"), Budget(seconds=11), 1
    )
    assert [(record.spent.step, record.spent.seconds) for record in records] == [(1, 2), (6, 12)]


def test_what_happens_between_two_steps_is_no_training(monkeypatch):
    """A step that the executor says took 3 s, of which 2 passed in what watched it."""
    clock = iter([0.0, 1.0, 100.0, 101.0, 200.0, 201.0, 300.0])
    monkeypatch.setattr("metadist.compare.run.perf_counter", clock.__next__)
    records = run_on_budget(
        lambda run_dir: contender(run_dir, executor=Timed()), Folder("run"), Budget(steps=3), 1
    )
    # 3 - 1 of the first step, of which nothing is known; 1 - 1 of each other.
    assert records[-1].spent.seconds == 2


class Uncounted(LocalExecutor):
    def run(self, until_version):
        for report in super().run(until_version):
            yield report._replace(results=tuple(r._replace(calls={}) for r in report.results))


def test_a_budget_of_calls_needs_them_counted():
    with pytest.raises(ValueError, match="budget must not be of calls with an executor that does"):
        run_on_budget(
            lambda run_dir: contender(run_dir, executor=Uncounted()),
            Folder("run"),
            Budget(calls=9),
            1,
        )


@pytest.mark.parametrize("spoil", ["record", "checkpoint", "both"])
def test_a_run_goes_on_from_its_last_evaluation_with_a_good_checkpoint(spoil):
    whole = run_on_budget(contender, Folder("whole"), Budget(steps=9), 3)
    begun = run_on_budget(contender, Folder("run"), Budget(steps=9), 3)
    kept = 2
    if spoil != "checkpoint":
        lines = Path("run/records.jsonl").read_text().splitlines()
        Path("run/records.jsonl").write_text("\n".join(lines[: 4 - 1]) + "\n")
    if spoil != "record":
        last = 9 if spoil == "checkpoint" else 6
        Path(f"run/run/checkpoints/step-{last:08d}/state.json").write_text("{}")
    if spoil == "checkpoint":  # a finished run is not touched
        before = contents(Path("run"))
        assert run_on_budget(contender, Folder("run"), Budget(steps=9), 3) == begun
        assert contents(Path("run")) == before
        return
    again = run_on_budget(contender, Folder("run"), Budget(steps=9), 3)
    assert [r.metrics for r in again] == [r.metrics for r in whole]
    assert again[:kept] == begun[:kept]


class Interrupted(LocalExecutor):
    """By Ctrl-C in its sixth step, once."""

    done = False

    def run(self, until_version):
        for report in super().run(until_version):
            if report.step.version == 6 and not self.done:
                self.done = True
                raise KeyboardInterrupt
            yield report


def test_an_interrupted_run_goes_on_to_the_same_metrics():
    whole = run_on_budget(contender, Folder("whole"), Budget(steps=9), 3)
    executor = Interrupted()

    def make(run_dir: str) -> Contender:
        return contender(run_dir, executor=executor)

    with pytest.raises(KeyboardInterrupt):
        run_on_budget(make, Folder("run"), Budget(steps=9), 3)
    # The trainer has saved a step that was not evaluated.
    store = CheckpointStore("run/run/checkpoints")
    assert store.load()[1].state.version == 6
    assert [record.spent.step for record in read_records(Folder("run"))] == [1, 3]
    again = run_on_budget(make, Folder("run"), Budget(steps=9), 3)
    assert [record.metrics for record in again] == [record.metrics for record in whole]


def test_what_was_begun_without_an_evaluation_begins_anew():
    trainer = contender("run/run").trainer
    trainer.fit(2)
    records = run_on_budget(contender, Folder("run"), Budget(steps=4), 2)
    assert [record.spent.step for record in records] == [1, 2, 4]


def test_evaluations_that_round_badly_are_not_missed():
    records = run_on_budget(contender, Folder("run"), Budget(steps=49), 49)
    assert [record.spent.step for record in records] == list(range(1, 50))


def test_records_survive_the_file_with_metrics_that_are_not_finite():
    record = Record(Spent(3, 0.5, 7.0, {"hvp": 2}), {"a": math.inf, "b": math.nan, "c": 0.1})
    again = Record.of(json.loads(json.dumps(record.to_json(), allow_nan=False)))
    assert again.spent == record.spent
    assert again.metrics["a"] == math.inf and math.isnan(again.metrics["b"])
    assert again.metrics["c"] == 0.1


def test_a_cost_in_gradients_counts_a_product_twice():
    counts = {"inner_grad": 5, "inner_grad_x": 2, "outer_grads": 1, "hvp": 3, "jvp": 1}
    assert in_gradients(counts) == 12
    assert in_gradients(counts, support_share=0.5, query_share=0.1) == 5.6
    assert in_gradients({"directional": 1, "inner_value": 1, "outer_value": 1}) == 4


# Metrics


class Known(Quadratic):
    def solution_metrics(self, outer, inner):
        task = quadratic_task(0)
        return {"slope": float(true_hypergradient(self, outer, task).norm())}


def test_metrics_of_a_solution():
    problem, task = Known(2, 4), quadratic_task(0)
    outer = {"x": torch.tensor([0.3, -0.2], dtype=torch.float64)}
    a, b, c, _ = quadratic_terms(task)
    inner = {"y": torch.linalg.solve(a, b @ outer["x"] + c)}
    found = solution_metrics(problem, FixedTasks([task]), outer, inner)
    assert found == {
        "query_loss": pytest.approx(float(problem.outer_loss(outer, inner, task.query))),
        "support_loss": pytest.approx(float(problem.inner_loss(outer, inner, task.support))),
        "slope": pytest.approx(float(true_hypergradient(problem, outer, task).norm())),
    }


def test_metrics_of_several_kept_tasks_are_means():
    sampler = FixedTasks([quadratic_task(0), quadratic_task(1)])
    trainer = Trainer(
        Quadratic(2, 4), sampler, AID(), meta_batch_size=2, keep_state=True, quiet=True
    )
    trainer.fit(1)
    each = [
        solution_metrics(trainer.problem, sampler, trainer.outer, trainer.inner(i), i)
        for i in range(2)
    ]
    assert kept_metrics(trainer)["query_loss"] == pytest.approx(
        (each[0]["query_loss"] + each[1]["query_loss"]) / 2
    )


# What is chosen and told


def comparison(**changes: Any) -> Comparison:
    tree = {"entries": {"A": {}, "B": {}}, "budget": {"steps": 2}, **changes}
    return Comparison.of(tree)


def record(step: int, **metrics: float) -> Record:
    return Record(Spent(step, step / 2, 3.0 * step, {"hvp": step}), metrics)


def test_options_are_merged_mapping_by_mapping_and_class_by_class():
    shared = {"a": {"x": 1, "y": 2}, "b": {"class_path": "P", "init_args": {"p": 1, "q": 2}}}
    changed = merge(shared, {"a": {"y": 3}, "b": {"init_args": {"q": 4}}, "c": 5})
    assert changed == {
        "a": {"x": 1, "y": 3},
        "b": {"class_path": "P", "init_args": {"p": 1, "q": 4}},
        "c": 5,
    }
    other = {"class_path": "Q", "init_args": {"r": 1}}
    assert merge(shared, {"b": other})["b"] == other
    assert shared["a"] == {"x": 1, "y": 2}


def test_differences_are_named_by_their_path():
    before = {"a": {"b": 1}, "seeds": [0], "entries": {"A": {"x": 1}}}
    assert differences(before, before) == []
    grown = {**before, "seeds": [0, 1], "entries": {"A": {"x": 1}, "B": {}}}
    assert differences(before, grown) == []
    assert differences(grown, before) == [
        "seeds was [0, 1], is [0]",
        "entries.B was {}, is None",
    ]
    assert differences(before, {**before, "a": {"b": 2}}) == ["a.b was 1, is 2"]


def test_a_point_without_a_finite_metric_is_never_chosen():
    it = comparison(entries={"A": {"grid": {"x": [1, 2, 3]}}}, seeds=[5, 6])
    one, two, three = it.runs("A")
    assert [run.point for run in (one, two, three)] == [{"x": 1}, {"x": 2}, {"x": 3}]
    bad = Outcome(one, [record(2, query_loss=math.nan)], None)
    assert it.chosen([bad]) == [] == it.chosen([])
    chosen = it.chosen(
        [
            bad,
            Outcome(two, [record(1, query_loss=0.0), record(2, query_loss=3.0)], None),
            Outcome(three, [record(2, query_loss=2.0)], None),
            Outcome(one, [record(2, query_loss=1.0)], "failed"),
        ]
    )
    assert chosen == [three, three._replace(seed=6)]
    assert chosen[1].name == "runs/A/point-2/seed-6"


def outcomes() -> dict[str, list[Outcome]]:
    def run(entry: str, seed: int, *values: float, error: str | None = None) -> Outcome:
        records = [record(step, query_loss=v, acc=1 - v) for step, v in enumerate(values, 1)]
        return Outcome(Run(entry, seed, {}, {}, 0), records, error)

    return {
        "A": [run("A", 0, 0.5, 0.1, 0.3), run("A", 1, 0.5, 0.3, 0.5)],
        "B": [run("B", 0, 0.4, math.nan, 0.2), run("B", 1, error="ValueError: no")],
    }


def test_tables_hold_the_final_and_the_best_metrics():
    it = comparison(mode="min")
    table = rows(it, outcomes())
    a, b = csv.DictReader(io.StringIO(to_csv(table)))
    assert (float(a["query_loss"]), float(a["acc"])) == pytest.approx((0.4, 0.6))
    assert (float(a["query_loss at best"]), float(a["acc at best"])) == pytest.approx((0.2, 0.8))
    # The half width of a t-interval of two: 12.706 standard errors.
    assert float(a["query_loss +-"]) == pytest.approx(12.706 * 0.1, rel=1e-4)
    assert (b["runs"], b["query_loss"], b["query_loss +-"]) == ("1", "0.2", "")
    assert b["errors"] == "runs/B/seed-1: ValueError: no"
    markdown = to_markdown(it, table)
    assert "| A |  | 2 | 0.4 | 0.6 | 0.2 | 0.8 |" in markdown  # too few for an interval
    three = {"A": [*outcomes()["A"], outcomes()["A"][0]._replace(records=outcomes()["A"][1][1])]}
    # 4.303 standard errors of 0.3, 0.5 and 0.5.
    assert "| A |  | 3 | 0.4333 +- 0.29 |" in to_markdown(it, rows(it, three))
    assert "* runs/B/seed-1: ValueError: no" in markdown


def test_a_picture_has_a_curve_of_each_entry_and_leaves_out_what_is_not_finite(monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    plain = Figure.savefig

    def savefig(self, *arguments, **options):
        drawn.append(self)
        plain(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    png = curves("query_loss", outcomes())
    from matplotlib.image import imread

    assert imread(io.BytesIO(png), format="png").std() > 0.01
    (figure,) = drawn
    assert [panel.get_xlabel() for panel in figure.axes] == list(AXES)
    lines = [line for line in figure.axes[0].lines if line.get_label() in "AB"]
    assert [line.get_label() for line in lines] == ["A", "B"]
    assert lines[0].get_xydata()[0] == pytest.approx([0.5, 0.5])
    assert lines[0].get_xydata()[-1] == pytest.approx([1.5, 0.4])
    assert lines[1].get_xydata()[-1] == pytest.approx([1.5, 0.2])
    assert len(figure.axes[0].collections) == 1  # a band of the entry with two runs only

    def without_products(outcome: Outcome) -> Outcome:
        records = [r.__class__(r.spent._replace(calls={}), r.metrics) for r in outcome.records]
        return outcome._replace(records=records)

    first_order = list(map(without_products, outcomes()["A"]))
    curves("query_loss", {"A": first_order, "B": outcomes()["B"]})
    lines = [line.get_label() for line in drawn[-1].axes[-1].lines]
    assert (drawn[-1].axes[-1].get_xlabel(), lines) == ("products H v", ["B"])
    curves("query_loss", {"A": first_order})
    assert len(drawn[-1].axes) == len(AXES) - 1

"""The command line: the same training by flags, YAML or resumption, and its exit codes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from metadist import CheckpointStore, __version__, evaluate
from metadist.algorithms import ALGORITHMS
from metadist.cli import COMMANDS, main, train
from metadist.cli.catalogue import brief, title
from metadist.cli.names import KINDS, class_path, named
from metadist.compute import Compute
from tests.helpers import (
    CURVES,
    Outcome,
    contents,
    curves,
    finish,
    last_state,
    make_trainer,
    start,
    words,
)
from tests.tasks.helpers import write_tree


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def saved(run: str = "run") -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(run, "result.json").read_text())
    return result


def test_flags_train_and_everything_is_in_the_run_folder(cli, here):
    out = cli.good(
        *("train", *CURVES, "--run_dir", "run", "--num_steps", 4, "--seed", 3),
        *("--val_split", "val", "--val_every", 2, "--val_tasks", 3),
        *("--test_split", "test", "--test_tasks", 5),
    )
    assert sorted(path.name for path in Path("run").iterdir()) == [
        *("checkpoints", "config.yaml", "events.jsonl", "result.json", "tensorboard")
    ]
    result = saved()
    assert (result["num_steps"], result["num_tasks"], result["num_dropped"]) == (4, 16, 0)
    store = CheckpointStore("run/checkpoints")
    assert result["best"] == store.best() in ("step-00000002", "step-00000004")
    assert result["test"]["checkpoint"] == result["best"]
    assert result["settings"]["sampler"].startswith("Sinusoid(k_shot=5, k_query=5, seed=0, split=")
    assert result["settings"]["executor"] == "local"

    # The test is that of the best checkpoint on the split that was asked for.
    trainer = make_trainer(seed=3)
    expected = evaluate(
        trainer.problem,
        curves("test"),
        trainer.algorithm,
        store.load("best")[1].state.outer,
        5,
        compute=Compute(seed=3),
    )
    assert result["test"]["metrics"] == expected.to_json()["metrics"]
    assert "trained 4 outer steps, 16 tasks in " in out
    assert f"test at {result['best']}:\n  loss {expected.metrics['query_loss']} (before" in out
    assert "run folder: run\nTensorBoard: tensorboard --logdir run\n" in out
    assert list(here.iterdir()) == [here / "run"]


def test_the_seed_decides_on_the_initial_weights(cli):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        cli.good("train", *CURVES, "--run_dir", run, "--num_steps", 1, "--seed", seed)
    assert last_state(Path("a")) == last_state(Path("b")) != last_state(Path("c"))


def test_yaml_with_short_names_trains_as_flags_do(cli):
    cli.good("train", *CURVES, "--run_dir", "flags", "--num_steps", 3)
    Path("mine.yaml").write_text(
        yaml.safe_dump(
            {
                "sampler": {
                    "class_path": "sinusoid",
                    "init_args": {"k_shot": 5, "k_query": 5},
                },
                "problem": {
                    "class_path": "few_shot",
                    "init_args": {
                        "model": {"class_path": "mlp", "init_args": {"hidden": [8]}},
                        "loss": "mse",
                    },
                },
                "algorithm": {"class_path": "itd", "init_args": {"inner_steps": 2}},
                "outer_optimizer": {"lr": 0.01},
                "meta_batch_size": 4,
                "executor": "local",
                "quiet": True,
            }
        )
    )
    # Flags after the file change what it says.
    flags = ("--algorithm.inner_lr", "0.05", "--run_dir", "yaml", "--num_steps", "3")
    cli.good("train", "--config", "mine.yaml", *flags)
    assert last_state(Path("yaml")) == last_state(Path("flags"))


def test_the_printed_and_the_kept_config_train_the_same(cli):
    arguments = ("train", *CURVES, "--num_steps", 3, "--outer_optimizer.options", '{"eps": 1e-6}')
    printed = cli.good(*arguments, "--run_dir", "first", "--print_config")
    assert not Path("first").exists()
    Path("printed.yaml").write_text(printed)
    cli.good(*arguments, "--run_dir", "first")
    cli.good("train", "--config", "printed.yaml", "--run_dir", "second")
    cli.good("train", "--config", "first/config.yaml", "--run_dir", "third")
    assert last_state(Path("first")) == last_state(Path("second")) == last_state(Path("third"))
    kept = yaml.safe_load(Path("first/config.yaml").read_text())
    again = yaml.safe_load(Path("third/config.yaml").read_text())
    assert kept | {"run_dir": "third"} == again
    # What is kept does not depend on defaults that a later version may have.
    assert kept["algorithm"]["init_args"]["momentum"] == 0.0
    assert kept["sampler"]["class_path"] == "metadist.tasks.Sinusoid"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_its_short_name(cli, name):
    out = cli.good("train", *CURVES, "--algorithm", name, "--run_dir", "x", "--print_config")
    assert yaml.safe_load(out)["algorithm"]["class_path"] == class_path("algorithms", name)


@pytest.mark.parametrize("form", [("--algorithm", "reptile"), ("--algorithm=reptile",)])
def test_a_short_name_may_follow_a_space_or_an_equals_sign(cli, form):
    out = cli.good("train", "--sampler=sinusoid", *form, "--run_dir", "x", "--print_config")
    assert yaml.safe_load(out)["algorithm"]["class_path"] == "metadist.algorithms.Reptile"


def test_a_folder_of_images_is_trained_on_by_flags_only(cli, here):
    write_tree(here / "pictures", [f"class{i}" for i in range(9)], num_images=3)
    cli.good(
        *words("train --sampler image_folder --sampler.root pictures --sampler.n_way 2"),
        *words("--sampler.k_query 2 --sampler.image_size 16 --problem.model.n_way 2"),
        *words("--problem.model.width 4 --problem.model.image_size 16 --problem.adapt head"),
        *words("--algorithm.inner_steps 2 --meta_batch_size 2 --num_steps 2 --run_dir run"),
        *words("--test_split test --test_tasks 4 --val_split all --val_tasks 2"),
    )
    result = saved()
    assert "split='test'" in result["test"]["protocol"]["sampler"]
    assert 0 <= result["test"]["metrics"]["query_accuracy"]["mean"] <= 1


# Runs that exist


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 5 steps with checkpoints 2, 4 and 5, validated at each."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = "--num_steps 5 --checkpoint_every 2 --val_split val --val_every 2 --val_tasks 3"
    path = list(sys.path)
    assert main(["train", *CURVES, "--run_dir", str(run), *words(flags)]) == 0
    sys.path[:] = path
    return run


@pytest.fixture
def run(finished, here):
    """A copy of it."""
    subprocess.run(["cp", "-r", finished, here / "run"], check=True)
    return here / "run"


def test_resume_goes_on_to_the_bytes_of_an_undisturbed_run(cli, run, here):
    out = cli.good("resume", "run", "--num_steps", 8)
    assert "continuing run from step-00000005" in out
    flags = "--num_steps 8 --checkpoint_every 2 --val_split val --val_every 2 --val_tasks 3"
    cli.good("train", *CURVES, "--run_dir", "whole", *words(flags))
    assert last_state(run) == last_state(here / "whole")
    assert saved()["num_steps"] == 8


def test_resume_of_a_finished_run_changes_nothing(cli, run):
    before = contents(run)
    assert "nothing to do: 5 outer steps are taken, num_steps=5" in cli.good("resume", run)
    assert contents(run) == before


def test_resume_completes_a_run_that_was_stopped_before_its_result_was_written(cli, run):
    expected = saved()
    (run / "result.json").unlink()
    cli.good("resume", run)
    assert saved()["best"] == expected["best"]
    assert saved()["num_steps"] == 5


def test_resume_from_an_earlier_checkpoint_and_with_another_executor(cli, run):
    before = last_state(run)
    out = cli.good(
        *("resume", run, "--checkpoint", "step-00000002", "--executor", "local"),
        *("--num_steps", "6"),
    )
    assert "from step-00000002" in out
    assert CheckpointStore(str(run / "checkpoints")).load()[0] == "step-00000006"
    assert last_state(run) != before


def damage(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{}")


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_a_damaged_checkpoint_is_named_and_skipped(cli, run, command):
    damage(run, 5)
    code, out, err = cli(command, run, *(["--num_tasks", 3] * (command == "evaluate")))
    assert code == 0
    assert re.search(r"(?m)^skipped: checkpoint .*step-00000005 is damaged: state.json", err)
    assert "step-00000004" in out


def test_evaluate_judges_on_another_split(cli, run):
    out = cli.good("evaluate", run, "--num_tasks", 6, "--output", "mine.json")
    written = json.loads(Path("mine.json").read_text())
    checkpoint = CheckpointStore(str(run / "checkpoints")).load()[1]
    trainer = make_trainer()
    expected = evaluate(
        trainer.problem,
        curves("test"),
        trainer.algorithm,
        checkpoint.state.outer,
        6,
    )
    assert written == {"checkpoint": "step-00000005", **expected.to_json()}
    assert f"{run} step-00000005, 5 outer steps" in out
    assert f"  query_loss: {expected.metrics['query_loss']}\n" in out
    assert "  interval: 95 % Student t over tasks\n" in out


def metrics(cli, run, *flags):
    cli.good("evaluate", run, "--num_tasks", 4, "--output", "x.json", *flags)
    return json.loads(Path("x.json").read_text())


def test_evaluate_has_options_for_everything_that_is_judged(cli, run):
    plain = metrics(cli, run)
    assert metrics(cli, run) == plain
    more = metrics(cli, run, "--inner_steps", 7)
    assert "inner_steps=7" in more["protocol"]["algorithm"] and more != plain
    assert metrics(cli, run, "--checkpoint", "step-00000002")["checkpoint"] == "step-00000002"
    best = CheckpointStore(str(run / "checkpoints")).best()
    assert metrics(cli, run, "--checkpoint", "best")["checkpoint"] == best
    other = metrics(cli, run, "--sampler", "sinusoid", "--sampler.k_shot", 9)
    assert "k_shot=9" in other["protocol"]["sampler"]
    assert "split='val'" in metrics(cli, run, "--split", "val")["protocol"]["sampler"]
    assert metrics(cli, run, "--num_tasks", 2)["protocol"]["tasks"] == "2 (indices 0 .. 1)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inner_steps", "0"], "inner_steps must be >= 1, got 0"),
        (["--num_tasks", "1"], "num_tasks must be >= 2 for an interval, got 1"),
        (["--checkpoint", "step-00000009"], "checkpoint must be one of .* got 'step-00000009'"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(cli, run, flags, message):
    code, _, err = cli("evaluate", run, *flags)
    assert code == 2 and re.search("metadist evaluate: error: " + message, err), err


def flat(text: str) -> str:
    """Text of a table without its lines and line breaks."""
    return re.sub(r"[\s│┃━┏┓┗┛└┘┌┐├┤─┬┴┼┡┩╇]+", " ", text)


def test_inspect_shows_the_checkpoints_and_what_is_in_one(cli, run):
    out = flat(cli.good("inspect", run))
    best = CheckpointStore(str(run / "checkpoints")).best()
    for step in (2, 4, 5):
        mark = "good, best" if f"step-{step:08d}" == best else "good"
        assert re.search(rf"step-{step:08d} -\d+\.\d{{4}} {mark} ", out), out
    assert "step-00000005: outer step 5, next lease 20" in out
    assert "seed: 0" in out and "'name': 'adam'" in out
    assert "outer.features.0.weight (8, 1) float32 8" in out
    assert "optimizer.exp_avg (25,) float32 25" in out
    named = cli.good("inspect", run, "--checkpoint", "step-00000002")
    assert "step-00000002: outer step 2, next lease 8" in named
    assert "step-00000002: outer step 2" in cli.good(
        *("inspect", run / "checkpoints", "--checkpoint", "step-00000002")
    )


def test_inspect_fails_if_a_checkpoint_is_damaged(cli, run):
    damage(run, 5)
    code, out, _ = cli("inspect", run)
    assert code == 1
    assert "is damaged: state.json must have" in flat(out)
    assert "step-00000004: outer step 4" in out
    for step in (2, 4):
        damage(run, step)
    code, _, err = cli("inspect", run)
    assert code != 0 and "no good checkpoint in" in err
    code, _, err = cli("inspect", ".")
    assert code == 2 and "run_dir must be a folder with checkpoints, got '.'" in err


def test_status_shows_a_run_and_exits_with_0_while_it_is_well(cli, run):
    out = cli.good("status", run)
    assert re.search(r"^state +finished, last wrote ", out, re.MULTILINE)
    assert re.search(r"^step +5 of 5 *$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80
    events = run / "events.jsonl"
    began, *_ = events.read_text().splitlines()
    failed = json.dumps(json.loads(began) | {"event": "run_failed", "error": "OSError: full"})
    for more, state in (([], "running"), ([failed], "failed"), ([failed, began], "running")):
        events.write_text("\n".join([began, *more]) + "\n")
        code, out, _ = cli("status", run, "--stale_s", 1e6)
        assert (code, f"state       {state}" in out) == (int(state == "failed"), True)
    code, out, _ = cli("status", run, "--stale_s", 1e-6)
    assert code == 1 and "state       stale, last wrote " in out


def test_status_refuses_what_is_no_run(cli, here):
    code, out, err = cli("status", "nothing")
    assert code == 2 and out == ""
    assert "metadist status: error: run must be the folder of a run that has begun to" in err
    code, _, err = cli("status", "nothing", "--stale_s", 0)
    assert code == 2 and "stale_s must be > 0, got 0.0" in err


# What there is, and whether it is right


SMALL = words(
    "check-hypergradient --sampler sinusoid --sampler.k_shot 5 --problem.model mlp "
    "--problem.model.hidden [4] --problem.loss mse --algorithm.inner_lr 0.01"
)
"""A check of ITD that takes milliseconds."""


def test_a_hypergradient_is_checked_with_the_options_of_train(cli):
    out = flat(cli.good(*SMALL, "--algorithm.inner_steps", 3, "--max_error", "1e-6"))
    assert "ITD(inner_steps=3, inner_lr=0.01" in out
    assert "the unrolled map x -> f(x, A(x))" in out
    assert "3 inner_grad, 1 outer_grads, 3 hvp, 3 jvp" in out
    assert "13 and 13 numbers in float64" in out
    assert "the Hessian of g is not positive definite" in out


def test_a_check_may_be_a_yaml_file(cli):
    printed = cli.good(*SMALL, "--print_config")
    Path("check.yaml").write_text(printed)
    out = cli.good("check-hypergradient", "--config", "check.yaml", "--algorithm.inner_steps", 3)
    assert out == cli.good(*SMALL, "--algorithm.inner_steps", 3)
    settings = yaml.safe_load(printed)
    assert settings["sampler"]["class_path"] == "metadist.tasks.Sinusoid"
    assert settings["num_directions"] == 20 and list(settings["repeats"]) == [1, 10, 100]


def test_a_check_fails_where_max_error_is_exceeded(cli):
    code, out, err = cli(*SMALL, "--algorithm.first_order", "true", "--max_error", "0.01")
    assert code == 1 and "the unrolled map" in out
    assert re.search(
        r"metadist check-hypergradient: failed: the error against the unrolled map must be <= "
        r"max_error = 0.01, got 1\.\d+$",
        err,
    )
    implicit = ["--problem.adapt", "head", "--algorithm", "t1t2", "--algorithm.inner_lr", 0.01]
    with pytest.warns(RuntimeWarning, match=r"head\.weight, head\.bias"):
        code, _, err = cli(*SMALL, *implicit, "--max_error", "0.01")
    assert code == 1 and "against the solution must be" in err
    assert "got inf: that reference is not known here, see the note" in err
    cli.good(*SMALL, "--algorithm.first_order", "true")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_directions", 0], "num_directions must be >= 1, got 0"),
        (["--max_error", -1], "max_error must be >= 0, got -1.0"),
        (["--algorithm.inner_steps", 0], "inner_steps must be >= 1, got 0"),
        (["--algorithm.inner_lr", 1e300], "the hypergradient of task 0 must be finite, got NaN"),
        (["--algorithm", "newton"], "newton"),
        (["--sampler.k_shot", 0], "k_shot must be an integer >= 1"),
        (["--problem.model.in_features", 2], "inner_loss must be computable on task 0 of sampler"),
    ],
)
def test_a_check_refuses_what_it_cannot_do(cli, flags, message):
    code, out, err = cli(*SMALL, *flags)
    assert code == 2 and out == ""
    assert "metadist check-hypergradient: error: " in err and message in err


def test_list_names_everything_that_has_a_short_name(cli):
    out = flat(cli.good("list"))
    for name in (name for kind in KINDS for name in named(kind)):
        assert re.search(rf"\b{name}\b", out), name
    assert re.search(r"algorithms --algorithm aid, .* problems --problem amigo_toy, .* models", out)
    assert "glyphs A sampler of N-way K-shot tasks" in flat(cli.good("list", "samplers"))
    assert "conv4 Four blocks" in flat(cli.good("list", "models"))
    assert "local " in cli.good("list", "executors")
    assert "ssp Stale synchronous" in flat(cli.good("list", "policies"))


@pytest.mark.parametrize("width", [80, 200])
def test_list_algorithms_shows_all_facts_at_any_width(cli, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = cli.good("list", "algorithms")
    assert max(map(len, out.splitlines())) <= width
    assert "G = grad_y g" in out
    # Every word of every fact; in a table the lines of a cell are not one after another.
    found = set(flat(out).split())
    for name, cls in ALGORITHMS.items():
        assert name in found
        shown = [brief(cls, fact) for fact in ("Source", "Use", "For", "Cost", "State")]
        assert all(shown) and set(" ".join([title(cls), *shown]).split()) <= found, name


def test_an_unknown_kind_is_refused(cli):
    code, out, err = cli("list", "optimisers")
    assert code == 2 and out == ""
    assert "metadist list: error: kind must be one of algorithms, problems, models, sam" in err


# Exit codes


def test_help_and_version_are_told(cli):
    for command in ([], *([name] for name in COMMANDS)):
        assert "usage: metadist" in cli.good(*command, "--help")
    assert cli.good("--version") == f"metadist {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_is_refused_without_pages_of_usage(cli, command):
    code, out, err = cli(command, "--run_dir", "x", "--colour", "red")
    assert code == 2 and out == ""
    assert f"metadist {command}: error: " in err and len(err.splitlines()) < 8
    assert f"`metadist {command} --help` shows the options" in err


def test_an_unknown_command_is_refused(cli):
    for word in ("dance", "--dance"):
        code, _, err = cli(word)
        assert code == 2 and "command must be one of train" in err


MINE = """
import torch
from metadist.tasks import Sinusoid

class Faulty:
    def __init__(self, error: str = "LookupError", at: int = 9):
        self.error, self.at = error, at
    def sample(self, index):
        if index == self.at:
            raise __builtins__[self.error](f"no file for task {index}")
        return Sinusoid(k_shot=5, k_query=5).sample(index)

class Diverging(Sinusoid):
    def sample(self, index):
        task = super().sample(index)
        if index >= 4:
            task.support.tensors[1].fill_(torch.nan)
        return task
"""


@pytest.mark.parametrize("error", ["LookupError", "ValueError", "FileNotFoundError"])
def test_an_exception_of_a_user_s_sampler_ends_the_run_with_its_traceback(cli, here, error):
    (here / "mine.py").write_text(MINE)
    flags = ("--sampler", "mine.Faulty", "--sampler.error", error, "--checkpoint_every", 1)
    code, _, err = cli("train", *CURVES[6:], *flags, "--run_dir", "run", "--num_steps", 6)
    assert code == 1
    assert "Traceback" in err and "in sample" in err
    assert f"{error}: no file for task 9" in err
    assert CheckpointStore("run/checkpoints").load()[0] == "step-00000002"


def test_a_run_without_finite_hypergradients_fails(cli, here):
    (here / "mine.py").write_text(MINE)
    flags = ("--sampler", "mine.Diverging", "--max_dropped", 4, "--num_steps", 6)
    code, _, err = cli("train", *flags, *CURVES[2:], "--run_dir", "run")
    assert code == 1
    assert "metadist train: failed: the last 4 tasks in a row had no finite hypergradient" in err
    assert "Traceback" not in err


SCRIPT = Path(sys.executable).with_name("metadist")


def stopped_at(process: subprocess.Popen[str], step: int, number: signal.Signals) -> Outcome:
    """How a training process ends that gets a signal when it has taken `step` steps."""
    assert process.stderr is not None
    said = process.stderr.readline()
    while not said.startswith(f"step {step}/"):
        assert said or process.poll() is None
        said = process.stderr.readline()
    process.send_signal(number)
    return finish(process)


@pytest.mark.skipif(not SCRIPT.exists(), reason="metadist is not installed with its script")
def test_a_stopped_run_leaves_a_checkpoint_and_is_resumed_to_the_same_bytes(cli, here):
    """By Ctrl-C and by SIGTERM, by the module and by the console script, at the same time."""
    flags = [flag for flag in CURVES if flag not in ("--quiet", "true")]
    flags = ["train", *flags, *words("--log_every 1 --num_steps 60 --run_dir")]
    processes = {
        130: (start(["-m", "metadist", *flags, "130"], here), signal.SIGINT),
        143: (start([SCRIPT, *flags, "143"], here), signal.SIGTERM),
    }
    with ThreadPoolExecutor() as pool:
        outcomes = {
            code: pool.submit(stopped_at, process, 7, number)
            for code, (process, number) in processes.items()
        }
    cli.good("train", *CURVES, "--run_dir", "whole", "--num_steps", 60)
    for code, found in outcomes.items():
        outcome = found.result()
        assert outcome.code == code, outcome.err
        stopped = re.search(r"interrupted at step (\d+), saved (step-\d+)", outcome.err)
        assert stopped and 7 <= int(stopped[1]) < 60
        assert "Traceback" not in outcome.err
        run = here / str(code)
        assert CheckpointStore(str(run / "checkpoints")).load()[0] == stopped[2]
        assert not (run / "result.json").exists()

        assert f"continuing {run.name} from {stopped[2]}" in cli.good("resume", run.name)
        assert last_state(run) == last_state(here / "whole")
        assert saved(run.name)["num_steps"] == 60


def test_the_state_of_the_process_is_left_as_it_was(cli):
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    cli.good("train", *CURVES, "--run_dir", "run", "--num_steps", 1)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("flags", "config", "model"),
    [
        ("--sampler glyphs", "", "metadist.models.Conv4"),
        ("--sampler glyphs", "problem: {init_args: {adapt: head}}", "metadist.models.Conv4"),
        ("--sampler no_data --problem hyper_cleaning --problem.num_examples 9", "", None),
        ("--sampler no_data --problem=hyper_cleaning --problem.num_examples 9", "", None),
        ("", "{sampler: no_data, problem: {class_path: hyper_cleaning, init_args: "
         "{num_examples: 9}}}", None),
    ],
)  # fmt: skip
def test_a_named_problem_has_its_own_model(flags, config, model, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config or "num_steps: 1")
    arguments = [*flags.split(), "--config", str(file)]
    found = train.parser().parse_args(arguments).problem.init_args.model
    assert (found and found.class_path) == model


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_named_algorithm_has_its_own_defaults(name):
    """And not those of the class that would have been the default."""
    config = train.parser().parse_args(["--sampler", "sinusoid", "--algorithm", name])
    found = ALGORITHMS[name](**vars(config.algorithm.init_args))
    assert found == ALGORITHMS[name]()

"""Help texts: what they show, at what width, and what they import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metadist.cli import COMMANDS

CLASSES = {
    "--executor.help ray": ("metadist.cluster.RayExecutor", "--executor.policy NAME"),
    "--executor.help=local": ("metadist.LocalExecutor",),
    "--executor.policy.help ssp": ("metadist.cluster.SSP", "--executor.policy.staleness INT"),
    "--algorithm.help itd": ("y_{t+1} = y_t - inner_lr", "--algorithm.inner_lr FLOAT"),
    "--sampler.help glyphs": ("metadist.tasks.Glyphs", "--sampler.n_way INT", "[default: 5]"),
    "--problem.help few_shot": ("--problem.model NAME", "mlp, resnet12, supernet. [required"),
    "--problem.model.help Conv4": ("metadist.models.Conv4", "--problem.model.width INT"),
    "--algorithm.help": ("--algorithm NAME, one of", "Iterative differentiation", "lancbio"),
    "--outer_optimizer.help": ("--outer_optimizer.lr FLOAT", "[default: 0.001]"),
    "--outer_optimizer.lr.help": ("--outer_optimizer.lr FLOAT",),
    "--keep_state.help": ("--keep_state {true,false", "every task is new"),
}


@pytest.fixture(params=[80, 120])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def test_the_overview_has_a_line_for_each_command(cli):
    out = cli.good("--help")
    assert out == cli.good()
    for command, line in COMMANDS.items():
        assert f"  {command} " in out and f" {line}\n" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_its_options(cli, command, width):
    out = cli.good(command, "--help")
    assert out.startswith(f"usage: metadist {command} ")
    assert "==SUPPRESS==" not in out and "Union" not in out and "CLASS_PATH_OR_NAME" not in out
    assert max(map(len, out.splitlines()[1:])) <= width


def test_train_shows_what_is_required_first_and_groups_the_rest(cli):
    out = cli.good("train", "--help")
    assert out.startswith("usage: metadist train --sampler NAME --run_dir FOLDER [options]\n")
    order = ["What is trained:", "  --sampler", "  --algorithm NAME", "The run:", "  --run_dir",
             "Outer steps:", "--outer_optimizer.OPTION", "Validation and test:", "Computation:",
             "Checkpoints and logs:", "Other options:"]  # fmt: skip
    places = [out.index(word) for word in order]
    assert places == sorted(places)
    assert "[default: itd]" in out and "--algorithm.help NAME" not in out
    assert "lancbio" not in out


@pytest.mark.parametrize("flags", CLASSES)
def test_classes_and_groups_are_shown_by_short_name(cli, flags, width):
    out = cli.good("train", *flags.split())
    for word in CLASSES[flags]:
        assert word in " ".join(out.split()), out
    options = out.partition("\nOptions:\n")[2]
    assert max(map(len, options.splitlines()), default=0) <= width


def test_the_help_of_something_unknown_names_the_nearest(cli):
    Path("mine.py").write_text("raise KeyError('width')")
    for flags, message in (
        (
            "--executor.help rey",
            "executor must be one of data_parallel, local, ray, got 'rey'",
        ),
        ("--algoritm.help itd", "got 'algoritm': did you mean algorithm?"),
        ("--keepstate.help", "got 'keepstate': did you mean keep_state?"),
        ("--sampler.help no.Such", "sampler must be a class path, got 'no.Such': No module named"),
        ("--sampler.help csv.reader", "sampler must name a class whose parameters Python can list"),
        ("--sampler.help mine.S", "got 'mine.S': its module raises KeyError: 'width'"),
    ):
        code, out, err = cli("train", *flags.split())
        assert (code, out) == (2, "") and message in err, err


HEAVY = ["torch", "ray", "tensorboard", "jsonargparse", "numpy"]
CORE = ["torch", "numpy"]
NEEDS = {
    "train": CORE,
    "check-hypergradient": CORE,
    "compare": ["numpy"],
    "doctor": CORE,
    "tune": ["numpy"],
}
LIST = """
import sys
from pathlib import Path
from metadist.cli import main
for arguments in " ".join(sys.argv[1:]).split(" AND "):
    try:
        main(arguments.split())
    except SystemExit:
        pass
print("loaded:", *(name for name in {heavy} if name in sys.modules))
"""


def loaded(*arguments: str) -> list[str]:
    """The heavy packages that a call of the command line imports, or several (AND)."""
    code = LIST.format(heavy=HEAVY)
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.partition("loaded:")[2].split()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_a_help_imports_only_what_it_shows(command):
    expected = NEEDS.get(command, []) + (["jsonargparse"] if command else [])
    assert sorted(loaded(*command.split(), "--help")) == sorted(expected)


def test_looking_at_a_run_needs_no_ray(tmp_path):
    assert "ray" not in loaded("status", str(tmp_path), "AND", "inspect", str(tmp_path))


@pytest.mark.parametrize("command", ["list", "list algorithms", "list executors", "data list"])
def test_a_list_needs_neither_torch_nor_ray(command):
    assert not {"torch", "ray"} & set(loaded(*command.split()))

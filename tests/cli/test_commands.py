"""Exit codes, signals, and what a command leaves behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from metadist import CheckpointStore, __version__
from metadist.cli import commands
from tests.cli.helpers import saved
from tests.helpers import CURVES, Outcome, finish, last_state, start, store_of, words


def test_the_version_is_printed(cli):
    assert cli.good("--version") == f"metadist {__version__}\n"


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
        assert store_of(run).load()[0] == stopped[2]
        assert not (run / "result.json").exists()

        assert f"continuing {run.name} from {stopped[2]}" in cli.good("resume", run.name)
        assert last_state(run) == last_state(here / "whole")
        assert saved(run.name)["num_steps"] == 60


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 143), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_has_its_exit_code(number, code):
    def run() -> int:
        signal.raise_signal(number)
        return 0

    assert commands._exit_code("train", run) == code


@pytest.mark.parametrize("code", [0, None])
def test_code_that_exits_early_has_failed(code, capsys):
    assert commands._exit_code("train", lambda: sys.exit(code)) == 1
    assert "somebody's code called sys.exit() before the work was done" in capsys.readouterr().err


def test_the_state_of_the_process_is_left_as_it_was(cli):
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    cli.good("train", *CURVES, "--run_dir", "run", "--num_steps", 1)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert torch.get_num_threads() == threads

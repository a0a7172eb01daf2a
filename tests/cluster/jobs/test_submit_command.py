"""`metadist submit`, and `metadist train --if_exists continue`, which it lets Ray run."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.job_submission import JobStatus

from metadist import CheckpointStore
from metadist.cli import main
from metadist.cluster.jobs import submit as submit_module
from metadist.cluster.jobs.submit import job_name
from tests.cluster.jobs.test_submit import Jobs

RUN_DIR = "/shared/runs/mine"
CURVES = [
    *("--sampler", "sinusoid", "--problem.model", "mlp", "--problem.model.in_features", "1"),
    *("--problem.model.out_features", "1", "--meta_batch_size", "4"),
    *("--problem.loss", "mse", "--seed", "3"),
]
SUBMIT = ["submit", "--working_dir", "null", "--", *CURVES, "--run_dir", RUN_DIR]


class Running(Jobs):
    """Jobs that print these and end so."""

    def __init__(self, printed: list[str | BaseException], status: JobStatus, code: int | None):
        super().__init__()
        self.printed = printed
        self.end = {"status": status, "driver_exit_code": code}

    async def tail_job_logs(self, id: str):
        for item in self.printed:
            if isinstance(item, BaseException):
                raise item
            yield item
        vars(self.register[id]).update(self.end)


@pytest.fixture
def jobs(monkeypatch):
    def make(*printed, status=JobStatus.SUCCEEDED, code=0):
        jobs = Running(list(printed), status, code)
        monkeypatch.setattr(submit_module, "JobSubmissionClient", lambda address: jobs)
        return jobs

    return make


ID = f"{job_name(RUN_DIR)}-1"


def test_what_the_run_prints_is_printed_and_its_exit_code_returned(jobs, capsys):
    running = jobs("step 1\n", "step 2\n", status=JobStatus.FAILED, code=2)
    assert main(SUBMIT) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"job {ID}: started\n")
    assert f"ray job stop --address http://127.0.0.1:8265 {ID}\nstep 1\nstep 2\n" in out
    assert f"tensorboard --logdir {RUN_DIR}" in out
    assert out.endswith(f"job {ID} FAILED\n")
    assert running.register[ID].entrypoint.endswith(f"--run_dir {RUN_DIR} --if_exists continue")


def test_without_following_the_command_ends_at_once(jobs, capsys):
    running = jobs("step 1\n")
    assert main(["submit", "--follow", "false", *SUBMIT[1:]]) == 0
    assert "step 1" not in capsys.readouterr().out
    assert running.register[ID].status == JobStatus.RUNNING


def test_an_interrupt_ends_the_following_and_not_the_job(jobs, capsys):
    running = jobs("step 1\n", KeyboardInterrupt())
    assert main(SUBMIT) == 130
    assert f"job {ID} still runs; submit the same again to follow it" in capsys.readouterr().out
    assert running.register[ID].status == JobStatus.RUNNING
    running.printed = ["step 1\n", "step 2\n"]
    assert main(SUBMIT) == 0
    assert "at work on this run_dir already" in capsys.readouterr().out


def test_a_lost_connection_is_not_taken_for_the_end(jobs, capsys):
    jobs("step 1\n", RuntimeError("WebSocket connection closed unexpectedly"))
    assert main(SUBMIT) == 1
    assert f"the connection to job {ID} was lost, the job goes on" in capsys.readouterr().err


def test_what_train_would_refuse_is_not_submitted(jobs, capsys):
    running = jobs()
    assert main(SUBMIT[:-2]) == 2
    assert "run_dir must name a folder on the cluster, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*SUBMIT, "--num_stepps", "3"])
    assert "num_stepps" in capsys.readouterr().err
    assert not running.register


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def train(num_steps: int, run_dir: str = "run") -> int:
        options = ["--run_dir", run_dir, "--num_steps", str(num_steps)]
        return main(["train", *CURVES, *options, "--if_exists", "continue"])

    return train


def last_bytes(run_dir: str) -> list[bytes]:
    store = CheckpointStore(f"{run_dir}/checkpoints")
    folder = Path(run_dir, "checkpoints", store.names()[-1])
    return [file.read_bytes() for file in sorted(folder.iterdir())]


def test_train_begins_continues_and_says_when_there_is_nothing_to_do(train, capsys):
    assert train(4, "undisturbed") == 0
    assert train(2) == 0
    assert "continuing" not in capsys.readouterr().out
    assert train(4) == 0
    assert "continuing run from step-00000002" in capsys.readouterr().out
    assert last_bytes("run") == last_bytes("undisturbed")
    assert train(4) == 0
    out = capsys.readouterr().out
    assert "nothing to do: 4 outer steps are taken" in out
    assert "trained" not in out


def test_the_folder_of_something_else_is_not_continued(train, capsys):
    Path("run").mkdir()
    Path("run", "config.yaml").touch()
    assert train(4) == 2
    assert "run_dir must be a new or empty folder, got 'run'" in capsys.readouterr().err

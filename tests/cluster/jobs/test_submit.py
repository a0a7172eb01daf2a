"""Handing a run to Ray as a job: what is shipped, one job per run folder, exit codes, files."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.job_submission import JobStatus

from metadist.cluster import ConnectError
from metadist.cluster.jobs import submit as submit_module
from metadist.cluster.jobs.submit import Job, job_name, pack, submit

LAUNCH = Path(submit_module.__file__).parents[1] / "launch"
ROOT = Path(__file__).parents[3]


class Jobs:
    """What Ray's job client does, with a register in this process.

    Args:
        rivals: ids of jobs that somebody submits a moment before us.
    """

    def __init__(self, *rivals: str) -> None:
        self.register: dict[str, SimpleNamespace] = {}
        self.rivals = list(rivals)

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.register.values())

    def submit_job(self, *, submission_id: str, **job: Any) -> None:
        if self.rivals:
            self.add(self.rivals.pop())
        if submission_id in self.register:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        self.add(submission_id, **job)

    def add(self, id: str, status: JobStatus = JobStatus.RUNNING, **job: Any) -> None:
        fields = {"driver_exit_code": None, "message": None, **job}
        self.register[id] = SimpleNamespace(submission_id=id, status=status, **fields)

    def get_job_info(self, id: str) -> SimpleNamespace:
        return self.register[id]


@pytest.fixture
def jobs(monkeypatch):
    jobs = Jobs()
    monkeypatch.setattr(submit_module, "JobSubmissionClient", lambda address: jobs)
    return jobs


NAME = job_name("/shared/runs/mine")


def hand_in(working_dir: str | None = None) -> Job:
    return submit(["train"], "/shared/runs/mine", "http://head:8265", working_dir)


def test_a_second_submission_finds_the_first(jobs):
    first, second = hand_in(), hand_in()
    assert (first.id, first.is_new) == (f"{NAME}-1", True)
    assert (second.id, second.is_new) == (f"{NAME}-1", False)
    other = submit(["train"], "/shared/runs/other", "http://head:8265", None)
    assert other.is_new


@pytest.mark.parametrize("end", [JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED])
def test_after_the_end_there_is_another_attempt(jobs, end):
    for number in range(1, 11):
        jobs.add(f"{NAME}-{number}", end)
    assert (hand_in().id, hand_in().is_new) == (f"{NAME}-11", False)


def test_of_two_at_the_same_moment_one_starts_the_run(jobs):
    jobs.rivals = [f"{NAME}-1"]
    job = hand_in()
    assert (job.id, job.is_new) == (f"{NAME}-1", False)


def test_a_head_that_has_just_started_is_waited_for(jobs, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    refusal = "Request failed with status code 500: No available agent to submit job."
    answers = [RuntimeError(refusal), RuntimeError(refusal), None]
    monkeypatch.setattr(jobs, "submit_job", Mock(side_effect=answers))
    assert hand_in().is_new
    assert jobs.submit_job.call_count == 3
    monkeypatch.setattr(submit_module, "START_S", 0.0)
    monkeypatch.setattr(jobs, "submit_job", Mock(side_effect=RuntimeError(refusal)))
    with pytest.raises(ConnectError, match="no node of this Ray can start jobs"):
        hand_in()


def test_the_job_runs_here_or_where_the_files_are_shipped_to(jobs, tmp_path, monkeypatch):
    folder = tmp_path / "it's mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    here = submit(["train", "--lr", "a b"], "mine", "http://head:8265", None)
    entrypoint = jobs.register[here.id].entrypoint
    there = subprocess.run(
        ["sh", "-c", entrypoint.replace("exec", "pwd; echo")],
        cwd="/",
        check=True,
        capture_output=True,
        text=True,
    )
    assert there.stdout.startswith(str(folder))
    assert entrypoint.endswith("-m metadist train --lr 'a b'")
    assert here.id == f"{job_name(str(folder / 'mine'))}-1"
    shipped = jobs.register[hand_in(".").id]
    assert shipped.entrypoint == "exec python -m metadist train"
    assert shipped.runtime_env["working_dir"].endswith(".zip")


def test_metadist_can_be_shipped(jobs):
    job = submit(["train"], "s3://bucket/mine", "http://head:8265", None, ship_metadist=True)
    (module,) = jobs.register[job.id].runtime_env["py_modules"]
    assert (Path(module) / "cluster" / "jobs" / "submit.py").is_file()


def test_a_run_folder_that_ray_would_delete_is_refused(jobs):
    message = "run_dir must be an absolute path on the cluster, got 'runs/mine'"
    with pytest.raises(ValueError, match=message):
        submit(["train"], "runs/mine", "http://head:8265", ".")
    assert not jobs.register


@pytest.mark.parametrize(
    ("status", "exit_code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, 137, 137),
        (JobStatus.FAILED, -9, 1),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 143),
    ],
)
def test_exit_codes(jobs, status, exit_code, expected):
    message = "it failed with exit code 2, last available logs (truncated): ..."
    jobs.add("a", status, driver_exit_code=exit_code, message=message)
    job = Job(jobs, "a", is_new=True)
    assert job.exit_code() == expected
    assert job.ending() == f"{status}: it failed with exit code 2"


def test_a_cluster_that_is_not_there_is_reported():
    with pytest.raises(ConnectError, match="address must be that of a Ray dashboard, got 'http"):
        submit(["train"], "/runs/mine", "http://127.0.0.1:1", None)


@pytest.fixture
def folder(tmp_path):
    code = ["my_tasks.py", "sub/more.py", "sub/figure.png", "notes/big.txt"]
    rest = [
        "runs/mine/result.json",
        ".env",
        "data/images.npz",
        "sub/__pycache__/a.pyc",
        ".git/HEAD",
    ]
    for name in code + rest:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(1000))
    return tmp_path


def test_code_is_shipped_and_runs_data_and_hidden_files_are_not(folder, tmp_path_factory):
    archive = tmp_path_factory.mktemp("zip") / "working_dir.zip"
    pack(folder, archive, (*submit_module.EXCLUDED, "*.png", "notes/*"))
    with zipfile.ZipFile(archive) as file:
        assert file.namelist() == ["my_tasks.py", "sub/more.py"]
        assert file.read("sub/more.py") == (folder / "sub" / "more.py").read_bytes()


def test_too_much_to_ship_is_refused_by_name(folder, monkeypatch, jobs):
    monkeypatch.setattr(submit_module, "MAX_SHIPPED_BYTES", 3500)
    (folder / "notes" / "big.txt").write_bytes(bytes(2 << 20))
    message = (
        r"working_dir must hold at most 0\.0 MiB of code, got 2\.0 MiB in .*notes \(2\.0 MiB\)"
    )
    with pytest.raises(ValueError, match=message):
        hand_in(str(folder))
    with pytest.raises(ValueError, match="working_dir must be a folder, got 'nowhere'"):
        hand_in("nowhere")
    assert not jobs.register


@pytest.mark.parametrize("name", ["local", "aws", "gcp"])
def test_cluster_files_are_valid_by_rays_schema(name):
    config = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "dashboard-host" not in config[commands][-1]


def test_the_manifest_of_kubernetes_has_the_fields_that_kuberay_knows():
    manifest = yaml.safe_load((LAUNCH / "rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]
    assert set(spec) <= {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes",
                         "ttlSecondsAfterFinished", "rayClusterSpec"}  # fmt: skip
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert cluster["authOptions"] == {"mode": "token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"}
    assert set(workers) == {*head, "groupName", "replicas", "minReplicas", "maxReplicas"}
    pod = head["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"]: "/runs" for volume in pod["volumes"]}
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_commands_of_the_page_are_those_that_are_tested():
    page = (ROOT / "docs" / "cluster.md").read_text()
    tested = (ROOT / "tests" / "cluster" / "test_hosts.py").read_text()
    commands = re.findall(r"(?m)^ +((?:ray|metadist) .*?)(?: -- .*| <.*)?$", page)
    assert len(commands) > 8
    for command in commands:
        assert command in tested, command

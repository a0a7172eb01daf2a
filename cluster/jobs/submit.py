"""A run as a Ray job, which outlives the connection that submitted it; one job per run folder.

Ray's list of jobs serves as the lock: the id of a job follows from its run folder, Ray refuses an
id that exists, and Ray notices when the process of a job is gone. So a second submission finds the
first one, and a crash leaves nothing to clean up.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shlex
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ray import exceptions
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from metadist.cluster.actors.connection import first_sentence, token_advice
from metadist.cluster.actors.errors import ConnectError
from metadist.cluster.actors.runtime_env import metadist_runtime_env
from metadist.run.uris import check_no_secret, check_no_secrets, tidy

MAX_SHIPPED_BYTES = 100 * 2**20
"""The most that Ray's dashboard accepts."""

START_S = 60.0
"""How long a head that has just started may be unable to run jobs."""

EXCLUDED = (".*", "__pycache__", "*.egg-info", "venv", "build", "dist", "runs", "data")
"""Names of files and folders that are never shipped."""


class Job:
    """A job that drives a run; `is_new` says whether it was started now, or found running."""

    def __init__(self, client: JobSubmissionClient, id: str, is_new: bool) -> None:
        self._client = client
        self.id = id
        self.is_new = is_new

    def follow(self, write: Callable[[str], object]) -> None:
        """Pass the output of the job to `write`, from its beginning until the job ends.

        Raises:
            ConnectError: The connection is lost; the job continues.
        """
        try:
            asyncio.run(self._follow(write))
            while not self.is_over():
                time.sleep(0.5)  # the log ends a moment before the job
        except (OSError, RuntimeError) as error:
            raise ConnectError(
                f"the connection to job {self.id} was lost, the job goes on: submit the same again "
                f"to follow it ({error})"
            ) from error

    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self._details().status.is_terminal()

    def exit_code(self) -> int:
        """The exit code of the job's process, if it has one; 0 only if the job succeeded."""
        details = self._details()
        if details.status == JobStatus.SUCCEEDED:
            return 0
        if details.status == JobStatus.STOPPED:
            return 143
        code = details.driver_exit_code
        return code if code is not None and code > 0 else 1

    def ending(self) -> str:
        """How the job ended, in words."""
        details = self._details()
        # After the first line of the message comes the log once more.
        reason = (details.message or "").strip().partition(", last available logs")[0]
        return f"{details.status}: {reason}" if reason else str(details.status)

    async def _follow(self, write: Callable[[str], object]) -> None:
        async for text in self._client.tail_job_logs(self.id):
            write(text)

    def _details(self) -> JobDetails:
        return self._client.get_job_info(self.id)


def submit(
    arguments: Sequence[str],
    run_dir: str,
    address: str,
    working_dir: str | None = ".",
    exclude: Sequence[str] = (),
    ship_metadist: bool = False,
) -> Job:
    """The job that runs `metadist ARGUMENTS`, or the one that already works on `run_dir`.

    Args:
        arguments: The arguments of the command line.
        run_dir: The run folder, as in the arguments; it identifies the job.
        address: The address of Ray's dashboard.
        working_dir: The folder with the user's modules, which is shipped and in which the job runs.
            None: nothing is shipped; this is the head node, and the job runs in this folder.
        exclude: Names or patterns of files and folders in it to leave out, besides `EXCLUDED`.
        ship_metadist: Ship this metadist too, for nodes that have only PyTorch, numpy and Ray: they
            install what else it needs with pip (docs/cluster.md).

    Raises:
        ValueError: The folder holds more than Ray accepts, the run folder would be lost, or a URI
            holds a secret, which all who reach the dashboard could read.
        ConnectError: No cluster at `address` accepts the connection.
    """
    check_no_secrets([address, *arguments])
    check_no_secret(run_dir, "run_dir")
    if working_dir is None:
        run_dir = run_dir if "://" in run_dir else os.path.abspath(run_dir)
        entrypoint = ["cd", os.getcwd(), "&&", "exec", sys.executable]
    elif "://" in run_dir or run_dir.startswith("/"):
        entrypoint = ["exec", "python"]
    else:
        raise ValueError(
            f"run_dir must be an absolute path on the cluster, got {run_dir!r}: the job runs in a "
            "folder that Ray deletes"
        )
    entrypoint += ["-m", "metadist", *arguments]
    client = _connect(address)
    with tempfile.TemporaryDirectory() as folder:
        runtime_env: dict[str, Any] = metadist_runtime_env() if ship_metadist else {}
        if working_dir is not None:
            archive = Path(folder, "working_dir.zip")
            pack(Path(working_dir), archive, (*EXCLUDED, *exclude))
            runtime_env["working_dir"] = str(archive)
        command = " ".join(word if word == "&&" else shlex.quote(word) for word in entrypoint)
        return _start_or_find(client, job_name(run_dir), command, runtime_env)


def job_name(run_dir: str) -> str:
    """The prefix of the ids of all jobs of a run folder, however it is written."""
    run_dir = tidy(run_dir)
    digest = hashlib.sha256(run_dir.encode()).hexdigest()[:10]
    last = re.sub(r"[^A-Za-z0-9]+", "-", run_dir.rpartition("/")[2])
    return f"metadist-{last}-{digest}"


def _connect(address: str) -> JobSubmissionClient:
    try:
        return JobSubmissionClient(address)
    except (OSError, RuntimeError, exceptions.RayError) as error:
        raise ConnectError(
            f"address must be that of a Ray dashboard, got {address!r}: {first_sentence(error)}. "
            "Is the cluster up (`ray status`), and the tunnel to another machine (`ray dashboard "
            f"cluster.yaml`)? {token_advice()}"
        ) from error


def _start_or_find(
    client: JobSubmissionClient, name: str, command: str, runtime_env: dict[str, Any]
) -> Job:
    deadline = time.monotonic() + START_S
    while True:
        attempts = _attempts(client, name)
        for attempt, details in attempts.items():
            if not details.status.is_terminal():
                return Job(client, f"{name}-{attempt}", is_new=False)
        id = f"{name}-{max(attempts, default=0) + 1}"
        try:
            client.submit_job(entrypoint=command, submission_id=id, runtime_env=runtime_env)
        except RuntimeError as error:
            if "No available agent" in str(error):  # the head may have just started
                if time.monotonic() > deadline:
                    raise ConnectError(
                        "no node of this Ray can start jobs: its agent has not started, or its "
                        "port (52365 unless said otherwise) is taken by another Ray on the machine "
                        "(logs/dashboard_agent.log of the Ray session says which); try again, or "
                        "start Ray with `--dashboard-agent-listen-port` and a free port"
                    ) from error
                time.sleep(1)
            elif "already exists" not in str(error):
                raise
            # Otherwise another submission came between our listing and our call.
        else:
            return Job(client, id, is_new=True)


def _attempts(client: JobSubmissionClient, name: str) -> dict[int, JobDetails]:
    """The jobs whose ids have this prefix, by number."""
    found: dict[int, JobDetails] = {}
    for details in client.list_jobs():
        start, _, number = (details.submission_id or "").rpartition("-")
        if start == name and number.isdigit():
            found[int(number)] = details
    return found


def newest_job(run_dir: str, address: str) -> Job | None:
    """The newest job of a run folder; None if there is none.

    Raises:
        ConnectError: No cluster at `address` accepts the connection.
    """
    client = _connect(address)
    # As `submit` names it where nothing is shipped, and as it is.
    for path in (run_dir, os.path.abspath(run_dir)):
        if attempts := _attempts(client, job_name(path)):
            return Job(client, f"{job_name(path)}-{max(attempts)}", is_new=False)
    return None


def pack(folder: Path, archive: Path, exclude: Sequence[str]) -> None:
    """Write the files of `folder` to a zip; ValueError if they are more than Ray accepts."""
    files = list(_files(folder, exclude))
    sizes: Counter[str] = Counter()
    for path in files:
        sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
    if sizes.total() > MAX_SHIPPED_BYTES:
        largest = ", ".join(f"{name} ({_megabytes(n)})" for name, n in sizes.most_common(3))
        raise ValueError(
            f"working_dir must hold at most {_megabytes(MAX_SHIPPED_BYTES)} of code, got "
            f"{_megabytes(sizes.total())} in {str(folder)!r}, most of it in {largest}: name what "
            "the run does not need with --exclude, and put data where the nodes find it"
        )
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in files:
            file.write(path, path.relative_to(folder))


def _files(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    def is_shipped(path: str) -> bool:
        name = os.path.basename(path)
        return not any(fnmatch(name, item) or fnmatch(path, item) for item in exclude)

    if not folder.is_dir():
        raise ValueError(f"working_dir must be a folder, got {str(folder)!r}")
    for parent, folders, names in os.walk(folder):
        inside = os.path.relpath(parent, folder)
        folders[:] = sorted(f for f in folders if is_shipped(os.path.normpath(f"{inside}/{f}")))
        for name in sorted(names):
            path = Path(parent, name)
            if is_shipped(os.path.normpath(f"{inside}/{name}")) and path.is_file():
                yield path


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"

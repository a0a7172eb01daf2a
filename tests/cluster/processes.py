"""Python processes that start Ray, and whatever descends from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]

CLUSTER = """
import os, time
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
import ray
from ray.cluster_utils import Cluster
from metadist.cluster import RayExecutor, Server, Workers
node = dict(object_store_memory=100 << 20)
cluster = Cluster(
    initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False, **node)
)
"""
"""How a program begins with a `cluster` of one CPU that soon notices when a node is gone."""


class Script:
    """A Python process whose descendants can be found by a mark in their environment.

    Args:
        source: The program.
        home: A private home folder; short, because paths of sockets must be.
        arguments: Those of the program.
        python: The interpreter.
        cwd: The folder that the program runs in.
        variables: Further environment variables.
    """

    def __init__(
        self,
        source: str,
        home: str,
        *arguments: str,
        python: str | Path = sys.executable,
        cwd: str | None = None,
        **variables: str,
    ) -> None:
        self.mark = f"METADIST_TEST={uuid.uuid4()}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        name, _, value = self.mark.partition("=")
        environment |= {name: value, "HOME": home, "PYTHONPATH": str(ROOT), **variables}
        self.process = subprocess.Popen(
            [python, "-c", source, *arguments],
            cwd=cwd,
            stdin=subprocess.PIPE,  # so that a program that reads it waits for `finish`
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self.process.poll() is not None

    def finish(self, timeout_s: float = 200) -> tuple[str, str]:
        """(stdout, stderr) at the end, of the process and all that descends from it."""
        try:
            output, errors = self.process.communicate(timeout=timeout_s)
            assert self.process.returncode == 0, output + errors
        finally:
            self.stop()
        return output, errors

    def processes(self) -> list[int]:
        """The ids of the live processes that descend from it, itself included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = self.mark.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if is_ours:
                found.append(int(folder.name))
        return found

    def stop(self) -> None:
        """Kill whatever is left."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()

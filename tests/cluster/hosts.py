"""Simulated hosts on one machine: a network namespace, processes, home and sshd for each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers import becomes

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
# So that nothing outlives the tests, however they end.
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
LAPTOP = "laptop"


def missing() -> str:
    """What this machine lacks for hosts of its own; empty if nothing."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        return "the right to make namespaces (root; in a container --privileged)"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "overlayfs"
    for tool in ("sshd", "ssh", "ssh-keygen", "rsync", "ip", "nsenter", "setpriv"):
        if not (shutil.which(tool) or Path("/usr/sbin", tool).exists()):
            return f"{tool} (Debian: openssh-server, openssh-client, rsync, iproute2, util-linux)"
    return ""


class Hosts:
    """A laptop and hosts at 10.77.0.2, 10.77.0.3, ... that it reaches by ssh.

    Everything is below one process and its namespaces, and ends with it.

    Args:
        work: for their homes and logs; a short path, because those of sockets must be.
        names: of the hosts.
    """

    def __init__(self, work: Path, names: list[str]) -> None:
        self.work = work
        self.user = work / "user"
        self.user.mkdir()
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 2)}
        for key in ("id", "host_key"):
            keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / key)]
            subprocess.run(keygen, check=True)
        (work / "auth_token").write_text(os.urandom(32).hex())
        (work / "auth_token").chmod(0o600)
        lan = ["bash", str(Path(__file__).with_name("lan.sh"))]
        with (work / "lan.log").open("w") as log:
            self._process = subprocess.Popen(
                [*DIES_WITH_US, *UNSHARE, *lan, str(work), str(ROOT), str(BIN), LAPTOP, *names],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if not becomes(lambda: self._are_up(names), timeout_s=60):
            logs = "\n".join(f"== {log.name}\n{log.read_text()}" for log in work.glob("*.log"))
            self.stop()
            raise RuntimeError(f"the hosts did not start:\n{logs}")

    def home(self, name: str) -> Path:
        """The home folder of the user on that host, as seen from here."""
        return self.work / name / "home"

    def run(self, command: str, **options: Any) -> tuple[int, str]:
        """(exit code, output) of a shell command, see `start`."""
        process = self.start(command, **options)
        output, _ = process.communicate()
        return process.returncode, output

    @contextmanager
    def running(self, command: str) -> Iterator[None]:
        """Within the block that command runs on the laptop."""
        process = self.start(f"{command} >/dev/null 2>&1")
        try:
            yield
        finally:
            self.signal(" ".join(command.split()[:3]), signal.SIGTERM)
            process.communicate()

    def start(self, command: str, name: str = LAPTOP, **environment: str) -> subprocess.Popen[str]:
        """A shell command, on the laptop in the folder `user`, whose output can be read."""
        variables = {
            "HOME": str(Path("~").expanduser()),
            "PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LC_ALL": "C.UTF-8",
            "RAY_AUTH_MODE": "token",
            "RAY_UP_enable_autoscaler_v2": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        }
        clean = ["env", "-i", *(f"{key}={value}" for key, value in variables.items())]
        return subprocess.Popen(
            [*self._inside(name), *clean, "bash", "-c", f"cd {self.user} && exec {command}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, name: str) -> None:
        """Kill every process of that host at once, as if its power was cut."""
        pid = (self.work / f"{name}.pid").read_text().strip()
        subprocess.run([*_enter(self._first()), "kill", "-9", pid], check=True)

    def signal(self, pattern: str, number: signal.Signals, name: str = LAPTOP) -> None:
        """Send a signal to the processes on that host whose command line has `pattern`."""
        kill = ["pkill", f"-{int(number)}", "-f", pattern]
        subprocess.run([*self._inside(name), *kill], check=True)

    def stop(self) -> None:
        """Kill everything."""
        if self._process.poll() is None:
            os.kill(self._first() or self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _are_up(self, names: list[str]) -> bool:
        return all((self.work / name / "up").exists() for name in (LAPTOP, *names))

    def _first(self) -> int:
        """The first process of the namespaces, 0 if there is none."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def _inside(self, name: str) -> list[str]:
        pid = int((self.work / f"{name}.pid").read_text())
        return [*_enter(self._first()), *_enter(pid)]


def _enter(pid: int) -> list[str]:
    return ["nsenter", "--net", "--mount", "--pid", "--uts", f"--target={pid}", "--"]

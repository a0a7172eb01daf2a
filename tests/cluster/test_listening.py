"""Nothing that shows a run to a browser listens beyond this machine unless it is told to."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.processes import Script

ROOT = Path(__file__).parents[2]

DASHBOARD = """
import ray
context = ray.init(
    address="local", num_cpus=1, include_dashboard=True, object_store_memory=100 << 20,
    log_to_driver=False,
)
print("dashboard", context.address_info["webui_url"], flush=True)
import sys
sys.stdin.read()
"""


def listening(port: int) -> set[str]:
    """The local addresses on which something listens at `port`, in hexadecimal."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state = line.split()[:4]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(address)
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}


def wait_for(port: int, is_alive: Callable[[], bool]) -> set[str]:
    deadline = time.monotonic() + 300
    while not (found := listening(port)):
        assert is_alive() and time.monotonic() < deadline
        time.sleep(0.2)
    return found


@pytest.mark.slow
def test_tensorboard_listens_on_loopback(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path)]
    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        assert wait_for(port, lambda: process.poll() is None) <= LOOPBACK
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_dashboard_listens_on_loopback():
    with tempfile.TemporaryDirectory() as home:
        script = Script(DASHBOARD, home)
        try:
            assert script.process.stdout is not None
            found = re.search(r"dashboard .*:(\d+)", script.process.stdout.readline())
            assert found is not None
            alive = script.process.poll
            assert wait_for(int(found[1]), lambda: alive() is None) <= LOOPBACK
        finally:
            script.stop()


@pytest.mark.parametrize("file", sorted((ROOT / "cluster" / "launch").glob("*.yaml")))
def test_no_cluster_file_opens_them(file):
    """The KubeRay manifest names the dashboard's port; it stays within the Kubernetes cluster."""
    text = file.read_text()
    assert not re.search(r"dashboard[-_]host|bind_all|tensorboard.*--host", text)
    assert not re.search(r"LoadBalancer|NodePort", text)


ALONE = """
import os, stat
from metadist.cluster.actors.connection import _session, connected

for fails in (True, False):
    try:
        with connected("local", 1):
            session = _session()
            assert stat.S_IMODE(session.stat().st_mode) == 0o700
            assert os.environ["RAY_USAGE_STATS_ENABLED"] == os.environ["EXPECTED"]
            assert not fails, "somebody's error"
    except AssertionError as error:
        assert str(error) == "somebody's error"
    assert session.exists() == fails
"""


@pytest.mark.slow
def test_a_cluster_of_our_own_is_private_silent_and_leaves_nothing(tmp_path):
    env = {name: value for name, value in os.environ.items() if "USAGE_STATS" not in name}
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env=env | {"EXPECTED": "0", "RAY_ADDRESS": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "cluster" / "launch").glob("*.yaml")))
def test_the_launch_files_send_no_usage_statistics(file):
    text = file.read_text()
    heads = re.findall(r"ray start --head.*", text)
    assert all("--disable-usage-stats" in head for head in heads)
    assert heads or '{name: RAY_USAGE_STATS_ENABLED, value: "0"}' in text

"""Three simulated hosts, started from cluster/launch/local.yaml, used as docs/cluster.md says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from metadist.cluster.jobs.submit import job_name
from tests.cluster.hosts import BIN, ROOT, Hosts, missing
from tests.helpers import becomes

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"simulated hosts need {missing()}"),
]

LONG_S = 600  # nothing but a fault takes so long
NAMES = ["host1", "host2", "host3"]
MY_TASKS = '''
import os, socket, time
from pathlib import Path
from metadist.tasks import Glyphs

class Gated:
    """Glyphs; the tasks of the second meta-batch wait for a file, and say where they do."""

    def __init__(self, folder: str):
        self.folder, self.glyphs = folder, Glyphs(k_query=2)

    def sample(self, index):
        if 8 <= index < 16:
            Path(self.folder, f"{os.getpid()} {socket.gethostname()}").touch()
            while not Path(self.folder, "open").exists():
                time.sleep(0.02)
        return self.glyphs.sample(index)

class Broken:
    def sample(self, index):
        if index >= 8:
            raise KeyError("a bug of the user")
        return Glyphs(k_query=2).sample(index)
'''
MODEL = [
    *("--problem.model", "conv4", "--problem.model.width", "8", "--problem.adapt", "head"),
    *("--meta_batch_size", "8", "--num_steps", "4", "--checkpoint_every", "1"),
]
ON_HOSTS = [
    *("--executor", "ray", "--executor.workers.start_timeout_s", str(LONG_S)),
    "--executor.workers.num_workers",
]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with tempfile.TemporaryDirectory(prefix="md", dir="/tmp") as folder:
        hosts = Hosts(Path(folder), NAMES)
        try:
            start_cluster(hosts, hosts.user)
            yield hosts
        finally:
            hosts.stop()


def start_cluster(hosts: Hosts, user: Path) -> None:
    """`ray up` with our own file, but for addresses and what a host of this size offers."""
    (user / "my_tasks.py").write_text(MY_TASKS)
    (user / "train.py").write_text((ROOT / "scripts" / "train.py").read_text())
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir"]
    subprocess.run([*build, str(user / "dist"), str(ROOT)], check=True, capture_output=True)
    config = yaml.safe_load((ROOT / "cluster" / "launch" / "local.yaml").read_text())
    head, *workers = hosts.addresses.values()
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"]["ssh_user"] = "root"
    config["cluster_name"] += f"-{os.getpid()}"  # Ray names sockets in /tmp, which is shared, by it
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[commands][-1] += " --num-cpus=1 --object-store-memory=100000000"
    (user / "cluster.yaml").write_text(yaml.safe_dump(config))
    succeed(hosts, "ray up -y cluster.yaml")
    succeed(hosts, "ray rsync-up cluster.yaml my_tasks.py '~/my_tasks.py'")


def succeed(hosts: Hosts, command: str) -> str:
    """The output of a command on the laptop that must not fail."""
    code, output = hosts.run(command)
    assert code == 0, f"{command}\n{output}"
    return output


def flags(folder: Path, run_dir: Path | str, num_workers: int = 0) -> str:
    """Options of a run whose second meta-batch waits for `folder`/open."""
    executor = [*ON_HOSTS, str(num_workers)] if num_workers else []
    sampler = ["--sampler", "my_tasks.Gated", "--sampler.folder", str(folder)]
    return " ".join([*sampler, *MODEL, *executor, "--run_dir", str(run_dir)])


def hosts_at_work(folder: Path) -> set[str]:
    return {path.name.split()[-1] for path in folder.iterdir()} - {"open"}


def checkpoint(run_dir: Path) -> dict[str, bytes]:
    """The files of the last checkpoint."""
    files = sorted((run_dir / "checkpoints" / "step-00000004").iterdir())
    assert files
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture
def gate(tmp_path) -> Path:
    folder = tmp_path / "gate"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts) -> dict[str, bytes]:
    """The last checkpoint of a run with these options in one process."""
    run_dir = hosts.work / "undisturbed"
    gate = hosts.work / "open_gate"
    gate.mkdir()
    (gate / "open").touch()
    command = [str(BIN / "python"), "-m", "metadist", "train", *flags(gate, run_dir).split()]
    run = subprocess.run(command, cwd=hosts.user, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return checkpoint(run_dir)


def test_submit_from_a_laptop(hosts, gate, undisturbed):
    run_dir = hosts.work / "runs" / "laptop"
    command = f"metadist submit -- {flags(gate, run_dir, num_workers=2)}"
    with hosts.running("ray dashboard cluster.yaml"):
        assert becomes(lambda: answers(hosts, 8265), LONG_S)
        following = hosts.start(command)
        assert becomes(lambda: len(hosts_at_work(gate)) == 2, LONG_S)
        hosts.signal("metadist submit", signal.SIGINT)
        output, _ = following.communicate()
        assert following.returncode == 130, output
        assert "still runs; submit the same again to follow it" in output
        # kill -9 of the process that drives the run; nothing is left to clean up.
        hosts.signal("metadist train", signal.SIGKILL, "host1")
        (gate / "open").touch()
        code, output = hosts.run(command)
    assert code == 0, output
    assert "from step-00000001" in output
    assert checkpoint(run_dir) == undisturbed


def test_submit_returns_the_exit_code_of_the_run(hosts, gate, tmp_path):
    options = " ".join([*MODEL, *ON_HOSTS, "2", "--run_dir"])
    submit = "metadist submit --address http://127.0.0.1:8266"
    broken = f"{submit} --ship_metadist true -- --sampler my_tasks.Broken {options}"
    broken = f"{broken} {hosts.work}/runs/broken"
    with hosts.running("ray dashboard cluster.yaml -p 8266"):
        assert becomes(lambda: answers(hosts, 8266), LONG_S)
        code, output = hosts.run(broken)
        assert (code, "a bug of the user" in output) == (1, True), output
        assert "py_modules_files" in output  # the metadist that raised it was that of the laptop
        (tmp_path / "file").touch()
        code, output = hosts.run(f"{submit} -- --sampler glyphs {options} {tmp_path}")
        assert (code, "must be a new or empty folder" in output) == (2, True), output
        code, output = hosts.run(broken, RAY_AUTH_MODE="disabled")
        assert (code, "address must be that of a Ray dashboard" in output) == (1, True), output
        run_dir = hosts.work / "runs" / "stopped"
        following = hosts.start(f"{submit} -- {flags(gate, run_dir, num_workers=2)}")
        assert becomes(lambda: len(hosts_at_work(gate)) == 2, LONG_S)
        stop = "ray job stop --address http://127.0.0.1:8266"
        succeed(hosts, f"{stop} {job_name(str(run_dir))}-1")
        output, _ = following.communicate()
        assert following.returncode == 143, output
        assert "saved step-" in output
        job = f"metadist train --sampler glyphs {options} {hosts.work}/runs/job"
        ray_submit = "ray job submit --address http://127.0.0.1:8266 --working-dir ."
        succeed(hosts, f"{ray_submit} -- {job}")
    assert json.loads((hosts.work / "runs" / "job" / "result.json").read_text())


def test_ray_submit_goes_on_without_a_host_that_died(hosts, gate, undisturbed):
    command = f"ray submit cluster.yaml train.py -- {flags(gate, 'runs/mine', num_workers=3)}"
    both = [hosts.start(command) for _ in range(2)]
    assert becomes(lambda: hosts_at_work(gate) == set(NAMES), LONG_S)
    hosts.kill("host3")
    (gate / "open").touch()
    started = 0
    for process in both:
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert "trained 4 outer steps" in output
        started += ": started" in output
    assert started == 1
    run_dir = hosts.home("host1") / "runs" / "mine"
    assert checkpoint(run_dir) == undisturbed
    events = (run_dir / "events.jsonl").read_text()
    assert '"worker_lost"' in events
    assert events.count('"run_started"') == 1
    assert "nothing to do: 4 outer steps are taken" in succeed(hosts, command)


def test_a_look_at_the_results_and_the_end(hosts):
    assert "Active:" in succeed(hosts, "ray exec cluster.yaml 'ray status'")
    board = "ray exec cluster.yaml -p 6006 'tensorboard --logdir ~/runs --port 6006'"
    with hosts.running(board):
        assert becomes(lambda: answers(hosts, 6006), LONG_S)
        tags = "curl -fs http://127.0.0.1:6006/data/plugin/scalars/tags"
        assert becomes(lambda: "tasks_per_second" in hosts.run(tags)[1], LONG_S)
    succeed(hosts, "ray rsync-down cluster.yaml '~/runs/mine' .")
    assert (hosts.user / "mine" / "result.json").is_file()
    ssh = "ssh -o StrictHostKeyChecking=no root@10.77.0.3"
    succeed(hosts, f"{ssh} '~/metadist/bin/ray stop'")
    succeed(hosts, "ray down -y cluster.yaml")
    for name in ("host1", "host2"):
        assert becomes(lambda: hosts.run("pgrep raylet", name=name)[0] == 1)  # noqa: B023


def answers(hosts: Hosts, port: int) -> bool:
    return hosts.run(f"curl -fs -o /dev/null http://127.0.0.1:{port}")[0] == 0

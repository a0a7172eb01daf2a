"""A cluster whose nodes have PyTorch and Ray, but neither metadist nor what else it needs."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.cluster.processes import Script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def with_dependencies(*names: str) -> set[str]:
    """The installed distributions that these requirements bring."""
    found: set[tuple[str, str]] = set()
    todo = [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        for extra in {"", *wanted.extras}:
            if (wanted.name, extra) in found:
                continue
            try:
                texts = importlib.metadata.requires(wanted.name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            found.add((wanted.name, extra))
            for requirement in map(Requirement, texts):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    todo.append(requirement)
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment with PyTorch, numpy, Ray and pip, linked from ours."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    links = folder / "links"
    links.mkdir()
    for name in with_dependencies("torch", "numpy", "ray[default]", "pip"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {".."}:
            if not (links / top).exists():
                (links / top).symlink_to(str(distribution.locate_file(top)))
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "links.pth").write_text(f"{links}\n")
    return folder / "venv" / "bin" / "python"


HEAD = """
import importlib.util, os, sys
import ray
context = ray.init(
    num_cpus=3,
    include_dashboard=True,
    object_store_memory=100 << 20,
    logging_level="WARNING",
    _temp_dir=os.environ["HOME"],  # where a job looks for the address of its cluster
)
absent = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
print(context.address_info["gcs_address"], context.dashboard_url, *absent, flush=True)
sys.stdin.read()
"""

LACKS = ["metadist", "higher", "jsonargparse", "rich", "safetensors", "tensorboard", "torchvision"]


@pytest.fixture(scope="module")
def head(bare_python: Path) -> Iterator[tuple[str, str]]:
    """The addresses (GCS, dashboard) of a Ray that runs on the bare Python."""
    with tempfile.TemporaryDirectory() as home:
        script = Script(
            HEAD,
            home,
            *LACKS,
            python=bare_python,
            cwd=home,
            PYTHONPATH="",
            RAY_AUTH_MODE="disabled",
        )
        assert script.process.stdout is not None
        gcs, dashboard, *absent = script.process.stdout.readline().split()
        assert absent == LACKS
        yield gcs, f"http://{dashboard}"
        script.finish()


WORKERS = """
import sys
import ray
from metadist.cluster import RayExecutor, Workers, metadist_runtime_env
from tests.cluster.toy import ADAM, first_state, local_run, make_workload, state_bytes
ray.init(address=sys.argv[1], runtime_env=metadist_runtime_env(), log_to_driver=False)
executor = RayExecutor(Workers(num_workers=2, start_timeout_s=600))
executor.start(make_workload(), ADAM, first_state())
list(executor.run(2))
print("same bytes", state_bytes(executor.state()) == state_bytes(local_run(2)[0]))
executor.close()
"""


def test_workers_run_the_metadist_of_the_driver(head, tmp_path):
    output, _ = Script(
        WORKERS, str(tmp_path), head[0], cwd=str(tmp_path), RAY_AUTH_MODE="disabled"
    ).finish(timeout_s=900)
    assert "same bytes True" in output


def test_a_submitted_run_needs_no_metadist_on_the_cluster(head, tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["submit", "--address", head[1], "--ship_metadist", "true", "--"]
    arguments += ["--sampler", "glyphs", "--num_steps", "2", "--run_dir", str(run_dir)]
    arguments += ["--executor", "ray", "--executor.workers.num_workers", "2"]
    arguments += ["--problem.model", "conv4", "--problem.model.width", "4"]
    source = "import sys; from metadist.cli import main; sys.exit(main(sys.argv[1:]))"
    output, _ = Script(
        source, str(tmp_path), *arguments, cwd=str(tmp_path), RAY_AUTH_MODE="disabled"
    ).finish(timeout_s=900)
    assert "trained 2 outer steps" in output
    assert json.loads((run_dir / "result.json").read_text())

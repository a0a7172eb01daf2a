"""The user's own code reaches the workers without being installed there."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import ray
import torch
from ray import cloudpickle

import metadist.cluster
from metadist.cluster import ClusterError, metadist_runtime_env
from metadist.cluster.actors.runtime_env import pickle_by_value, user_modules
from metadist.optimizer import OuterOptimizer
from tests.cluster.toy import local_run, make_workload, state_bytes


@pytest.fixture
def user_sampler(tmp_path, monkeypatch):
    """A sampler in a package of a user, with a sibling that it uses."""
    package = tmp_path / "my_research"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "noise.py").write_text(
        "SCALE = 0.5\n\ndef half(tensor):\n    return SCALE * tensor\n"
    )
    (package / "my_tasks.py").write_text(
        textwrap.dedent(
            """
            import torch
            from metadist.task import Batch, Task
            from my_research.noise import half

            class Mine:
                def sample(self, index):
                    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(index))
                    batch = Batch.of(inputs, half(inputs.sum(1)))
                    return Task(batch, batch, index)
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    sampler = importlib.import_module("my_research.my_tasks").Mine()
    yield sampler
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_research"]:
        del sys.modules[name]


def test_a_sampler_in_the_users_own_package_works_on_workers(executor, user_sampler):
    workload = make_workload(user_sampler)
    running = executor(workload)
    list(running.run(2))
    assert state_bytes(running.state()) == state_bytes(local_run(2, workload)[0])


def test_a_pickle_by_value_loads_where_the_modules_do_not_exist(user_sampler, tmp_path):
    (tmp_path / "payload").write_bytes(pickle_by_value(user_sampler))
    script = (
        "import sys; from ray import cloudpickle; "
        "task = cloudpickle.loads(open(sys.argv[1], 'rb').read()).sample(3); "
        "print([name for name in sys.modules if 'my_research' in name], task.support.tensors[1])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "payload")]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    assert output.strip() == f"[] {user_sampler.sample(3).support.tensors[1]}"


def test_registration_is_undone(user_sampler):
    module = sys.modules["my_research.noise"]
    cloudpickle.register_pickle_by_value(module)
    before = set(cloudpickle.list_registry_pickle_by_value())
    pickle_by_value(user_sampler)
    assert set(cloudpickle.list_registry_pickle_by_value()) == before
    cloudpickle.unregister_pickle_by_value(module)


def test_what_is_the_users(user_sampler):
    modules = user_modules()
    assert {sys.modules["my_research.my_tasks"], sys.modules["my_research.noise"]} <= {*modules}
    for module in (json, numpy, torch, ray, metadist.cluster, sys, pytest):
        assert module not in modules


def test_what_ships_metadist_holds_all_of_it():
    (folder,) = metadist_runtime_env()["py_modules"]
    for name in (
        "workload.py",
        "cluster/parameter_server/worker.py",
        "algorithms/__init__.py",
        "tasks/__init__.py",
    ):
        assert (Path(folder) / name).is_file()


def test_what_ships_metadist_names_its_dependencies_but_the_heavy_ones():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    listed = re.search(r"(?ms)^dependencies = \[\n(.*?)^\]", text)
    assert listed
    dependencies = re.findall('"(.*)"', listed[1])
    heavy = [name for name in dependencies if re.match("(numpy|ray|torch|torchvision)\\b", name)]
    assert len(heavy) == 4
    assert metadist_runtime_env()["pip"]["packages"] == sorted({*dependencies} - {*heavy})


def test_objects_of_metadist_are_pickled_by_reference():
    assert b"metadist.optimizer" in pickle_by_value(OuterOptimizer())
    assert len(pickle_by_value(OuterOptimizer())) < 500


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (SimpleNamespace(a=1, lock=threading.Lock()), "in lock, a lock. Open files"),
        (
            SimpleNamespace(problem=SimpleNamespace(parts=[0, {"x": threading.Lock()}])),
            r"in problem.parts\[1\]\['x'\], a lock. Open files",
        ),
        (threading.Lock(), r"object\. Open files"),
    ],
)
def test_what_cannot_be_sent_is_named(value, said):
    with pytest.raises(ClusterError, match=said):
        pickle_by_value(value)

"""One Ray instance for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import ray

from metadist.cluster import RayExecutor
from metadist.lease import Workload
from metadist.outer import OuterOptimizer, OuterState
from tests.cluster.toy import ADAM, first_state, make_workload

# How long an example takes is a matter of what else the machine does.
hypothesis.settings.register_profile("metadist", deadline=None)
hypothesis.settings.load_profile("metadist")


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local cluster of 4 nominal CPUs whose processes are started ahead, with torch loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=256 << 20,
            log_to_driver=False,
            namespace="test",
            _system_config={"preload_python_modules": ["torch", "metadist.cluster"]},
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def executor(ray_session: None) -> Iterator[Callable[..., RayExecutor]]:
    """Starts executors, one at a time; the last one again if its options are the same.

    A process that imports torch takes seconds to start, and the executor keeps its processes.
    """
    last: list[tuple[dict[str, Any], RayExecutor]] = []

    def start(
        workload: Workload | None = None,
        state: OuterState | None = None,
        optimizer: OuterOptimizer = ADAM,
        **options: Any,
    ) -> RayExecutor:
        if last and last[0][0] != options:
            last.pop()[1].close()
        if not last:
            last.append((options, RayExecutor(**{"start_timeout_s": 600.0, **options})))
        workload = workload or make_workload()
        state = state or first_state(workload.problem, optimizer)
        last[0][1].start(workload, optimizer, state)
        return last[0][1]

    yield start
    for _, item in last:
        item.close()

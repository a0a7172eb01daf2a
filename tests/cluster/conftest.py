"""One Ray instance for all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import ray

from metadist.cluster import RayExecutor, Workers
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterState
from metadist.workload import Workload
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


class Shared:
    """The executor that tests share, one at a time; it holds its CPUs until it is closed.

    A process that imports torch takes seconds to start, and an executor keeps its processes.
    """

    def __init__(self) -> None:
        self._options: dict[str, Any] = {}
        self._executor: RayExecutor | None = None

    def start(
        self,
        workload: Workload | None = None,
        first: OuterState | None = None,
        optimizer: OuterOptimizer = ADAM,
        **options: Any,
    ) -> RayExecutor:
        """A started executor: the last one again if its options are the same."""
        if self._executor is None or self._options != options:
            self.close()
            self._options = options
            workers = options.get("workers", Workers())
            if workers.start_timeout_s == Workers().start_timeout_s:  # processes start slowly here
                options = {**options, "workers": replace(workers, start_timeout_s=600.0)}
            self._executor = RayExecutor(**options)
        workload = workload or make_workload()
        first = first or first_state(workload.problem, optimizer)
        self._executor.start(workload, optimizer, first)
        return self._executor

    def close(self) -> None:
        """Free all CPUs, for a test with an executor of its own."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None


# Not of the session: it would hold CPUs that another module counts on.
@pytest.fixture(scope="module")
def shared(ray_session: None) -> Iterator[Shared]:
    shared = Shared()
    yield shared
    shared.close()


@pytest.fixture
def executor(shared: Shared) -> Callable[..., RayExecutor]:
    """Starts the shared executor."""
    return shared.start


@pytest.fixture
def free_cluster(shared: Shared) -> None:
    """The session's cluster with all its CPUs free."""
    shared.close()

"""Everything that runs on Ray: workers, parameter server, scheduler, policies, launching."""

if __name__ != "metadist.cluster":
    raise ImportError("import metadist.cluster, not cluster: a bare name may be any module")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadist.cluster.actors.errors import (
        ClusterError,
        ConnectError,
        LeaseError,
        ResourcesError,
        ServerLostError,
        WorkerLostError,
    )
    from metadist.cluster.actors.failure import Failures
    from metadist.cluster.actors.options import Server, Workers
    from metadist.cluster.actors.runtime_env import metadist_runtime_env
    from metadist.cluster.data_parallel.executor import DataParallelExecutor
    from metadist.cluster.jobs.tune import tune
    from metadist.cluster.parameter_server.executor import RayExecutor
    from metadist.cluster.parameter_server.policies import (
        ASP,
        BSP,
        SSP,
        Buffered,
        Policy,
        StalenessWeight,
        View,
    )

__all__ = [
    "ASP",
    "BSP",
    "SSP",
    "Buffered",
    "ClusterError",
    "ConnectError",
    "DataParallelExecutor",
    "Failures",
    "LeaseError",
    "Policy",
    "RayExecutor",
    "ResourcesError",
    "Server",
    "ServerLostError",
    "StalenessWeight",
    "View",
    "WorkerLostError",
    "Workers",
    "metadist_runtime_env",
    "tune",
]

_MODULES = (
    "metadist.cluster.actors.options",
    "metadist.cluster.parameter_server.policies",
    "metadist.cluster.actors.errors",
    "metadist.cluster.actors.failure",
    "metadist.cluster.actors.runtime_env",
    "metadist.cluster.jobs.tune",
    "metadist.cluster.data_parallel.executor",
    "metadist.cluster.parameter_server.executor",
)
"""Where the names of `__all__` are defined, those that need no Ray first."""


if not TYPE_CHECKING:  # as in metadist/__init__.py

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first used: importing Ray takes a second."""
        if name in __all__:
            for module in map(import_module, _MODULES):
                if name in vars(module):
                    return globals().setdefault(name, vars(module)[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return [*globals(), *__all__]

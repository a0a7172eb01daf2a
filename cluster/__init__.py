"""Everything that runs on Ray: workers, parameter server, scheduler, policies, launching."""

if __name__ != "metadist.cluster":
    raise ImportError("import metadist.cluster, not cluster: a bare name may be any module")

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

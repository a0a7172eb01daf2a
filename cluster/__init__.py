"""Everything that runs on Ray: workers, parameter server, scheduler, policies, launching."""

if __name__ != "metadist.cluster":
    raise ImportError("import metadist.cluster, not cluster: a bare name may be any module")

from metadist.cluster.data_parallel import DataParallelExecutor
from metadist.cluster.errors import (
    ClusterError,
    ConnectError,
    LeaseError,
    ResourcesError,
    ServerLostError,
    WorkerLostError,
)
from metadist.cluster.executor import RayExecutor
from metadist.cluster.policies import (
    ASP,
    BSP,
    SSP,
    Buffered,
    Policy,
    StalenessWeight,
    View,
    make_policy,
)
from metadist.cluster.runtime_env import metadist_runtime_env
from metadist.cluster.tune import tune

__all__ = [
    "ASP",
    "BSP",
    "SSP",
    "Buffered",
    "ClusterError",
    "ConnectError",
    "DataParallelExecutor",
    "LeaseError",
    "Policy",
    "RayExecutor",
    "ResourcesError",
    "ServerLostError",
    "StalenessWeight",
    "View",
    "WorkerLostError",
    "make_policy",
    "metadist_runtime_env",
    "tune",
]

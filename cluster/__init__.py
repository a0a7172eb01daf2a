"""Everything that runs on Ray: workers, parameter server, scheduler, policies, launching."""

if __name__ != "metadist.cluster":
    raise ImportError("import metadist.cluster, not cluster: a bare name may be any module")

from typing import TYPE_CHECKING

from metadist.exports import lazy

if TYPE_CHECKING:
    from metadist.cluster.actors.errors import ClusterError as ClusterError
    from metadist.cluster.actors.errors import ConnectError as ConnectError
    from metadist.cluster.actors.errors import LeaseError as LeaseError
    from metadist.cluster.actors.errors import MixedDevicesError as MixedDevicesError
    from metadist.cluster.actors.errors import ResourcesError as ResourcesError
    from metadist.cluster.actors.errors import ServerLostError as ServerLostError
    from metadist.cluster.actors.errors import WorkerLostError as WorkerLostError
    from metadist.cluster.actors.failure import Failures as Failures
    from metadist.cluster.actors.network import reach_nodes as reach_nodes
    from metadist.cluster.actors.network import versions as versions
    from metadist.cluster.actors.options import Server as Server
    from metadist.cluster.actors.options import Workers as Workers
    from metadist.cluster.actors.runtime_env import metadist_runtime_env as metadist_runtime_env
    from metadist.cluster.data_parallel.executor import DataParallelExecutor as DataParallelExecutor
    from metadist.cluster.jobs.tune import tune as tune
    from metadist.cluster.parameter_server.executor import RayExecutor as RayExecutor
    from metadist.cluster.parameter_server.policies import ASP as ASP
    from metadist.cluster.parameter_server.policies import BSP as BSP
    from metadist.cluster.parameter_server.policies import SSP as SSP
    from metadist.cluster.parameter_server.policies import Buffered as Buffered
    from metadist.cluster.parameter_server.policies import Policy as Policy
    from metadist.cluster.parameter_server.policies import StalenessWeight as StalenessWeight
    from metadist.cluster.parameter_server.policies import View as View

if not TYPE_CHECKING:  # so that type checkers believe in no other names
    __all__, __getattr__, __dir__ = lazy(__name__)

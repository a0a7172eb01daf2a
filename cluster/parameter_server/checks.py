"""What is refused before a run: workloads, options and an x that do not go together."""

from __future__ import annotations

import math
from typing import Literal

import ray
import torch

from metadist.cluster.actors.buffers import OuterSpec
from metadist.cluster.actors.connection import this_node
from metadist.cluster.actors.options import Server, Workers
from metadist.cluster.parameter_server.compression import Compression
from metadist.cluster.parameter_server.policies import Policy
from metadist.workload import Workload

StateName = Literal["server", "worker"]


def check_policy(workload: Workload, policy: Policy, workers: Workers, state: StateName) -> None:
    """Raise ValueError for workers and a policy that the leases of a workload do not fit."""
    if policy.is_synchronous and workers.num_workers > workload.leases_per_step:
        way_out = "lower num_workers, or begin a run with a lower tasks_per_lease"
        if workload.tasks_per_lease == 1:
            way_out = (
                "lower num_workers, or raise meta_batch_size"
                if workload.meta_batch_size > 1
                else "lower num_workers, or use DataParallelExecutor, which cuts one task up"
            )
        raise ValueError(
            f"num_workers must be <= {workload.leases_per_step} with policy="
            f"{str(policy)!r}, as many as an outer step has leases "
            f"(meta_batch_size={workload.meta_batch_size} / "
            f"tasks_per_lease={workload.tasks_per_lease}), got {workers.num_workers}: "
            f"the others would never work; {way_out}"
        )
    if workload.must_be_synchronous and not policy.is_synchronous:
        why = (
            "keep_state=True"
            if workload.keep_state
            else f"the two-point method {type(workload.algorithm).__name__}"
        )
        raise ValueError(
            f"policy must be synchronous, as BSP() is, with {why}, got {str(policy)!r}: "
            "every step needs what the step before it left"
        )
    if state == "worker" and not workload.keep_state:
        raise ValueError(
            "state must be 'server' with keep_state=False, got 'worker': nothing is kept from "
            "step to step that could stay on a worker. Leave it out"
        )


def check_server(
    workload: Workload, server: Server, spec: OuterSpec, compression: Compression
) -> None:
    """Raise ValueError for options of the server that x or a workload does not allow."""
    if server.num_shards > 1 and workload.stepping_rules().project is not None:
        raise ValueError(
            f"num_shards must be 1 with {type(workload.problem).__name__}, which has a "
            f"project_outer, got {server.num_shards}: a projection needs the whole of x"
        )
    if compression == "bfloat16" and spec.dtype == torch.float16:
        raise ValueError(
            "compression must be 'none' with an outer variable of float16, got 'bfloat16', "
            "which is as large and less exact"
        )
    gpus_per_server = server.gpus_per_server
    if gpus_per_server and workload.compute.device == "cpu":
        raise ValueError(
            f"device must not be 'cpu' with gpus_per_server={gpus_per_server:g}, got 'cpu': "
            "the server's GPU serves workers that have one themselves"
        )


def check_room_for_versions(spec: OuterSpec, snapshot_every: int) -> None:
    """Raise ValueError if the versions of x since a snapshot would fill the object store."""
    here = this_node()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    there = resources.get("object_store_memory", math.inf) / 2
    size = spec.num_elements * spec.dtype.itemsize
    most = int(there / size) - 1 if there < math.inf else math.inf
    if snapshot_every > most:
        raise ValueError(
            f"snapshot_every must be <= {most} with state='worker' and an outer variable of "
            f"{size / 1e6:.3g} MB, got {snapshot_every}: x of each step since the "
            f"last snapshot is kept, in half of the object store of {2 * there / 1e6:.4g} MB "
            "(object_store_bytes). Or leave the states with the server, state='server'"
        )

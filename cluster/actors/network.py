"""How the nodes of a running cluster reach one another: versions, latency, throughput."""

from __future__ import annotations

import platform
import time
from typing import Any, NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.cluster.actors.connection import connect, disconnect

TIMEOUT_S = 60.0
SIZE_BYTES = 32_000_000


class Reach(NamedTuple):
    """What a block of `SIZE_BYTES` finds of a node.

    Args:
        node: Its address.
        versions: Of Python, torch and Ray there.
        bytes_per_s: How fast the block went there: the slower of the ways from this process and
            from the node before it in the list.
        error: Why it was not reached, else None.
    """

    node: str
    versions: str
    bytes_per_s: float
    error: str | None


def versions() -> str:
    """Those of Python, torch and Ray in this process, which must be equal on all nodes."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, Ray {ray.__version__}"


def reach_nodes(address: str) -> list[Reach]:
    """Every live node of the cluster at `address`, reached from here and from another node.

    Blocks go in a ring, from each node to the next: N ways of the N (N - 1) that there are.

    Raises:
        ConnectError: There is no such cluster.
    """
    ours = connect(address, num_cpus=1, show_worker_output=False, object_store_bytes=None)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        block = ray.put(_block())
        found = []
        for node, before in zip(nodes, nodes[-1:] + nodes[:-1], strict=True):
            reach = _reach(node, block, "")
            if reach.error is None and before is not node:
                sent = _on(before)(_block).remote()
                ray.wait([sent], timeout=TIMEOUT_S, fetch_local=False)
                other = _reach(node, sent, f"from {before['NodeManagerAddress']}: ")
                reach = min(reach, other, key=lambda way: way.bytes_per_s)
            found.append(reach)
        return found
    finally:
        if ours:
            disconnect()


def _on(node: dict[str, Any]) -> Any:
    """What makes a function a task on that node."""
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    make: Any = ray.remote  # whose types know only some strategies
    return make(num_cpus=0, max_retries=0, scheduling_strategy=place)


def _reach(node: dict[str, Any], block: Any, way: str) -> Reach:
    there = _on(node)
    try:
        found = ray.get(there(versions).remote(), timeout=TIMEOUT_S)
        began = time.perf_counter()
        ray.get(there(_size).remote(block), timeout=TIMEOUT_S)
    except ray.exceptions.RayError as error:
        return Reach(node["NodeManagerAddress"], "", 0.0, way + str(error).splitlines()[0])
    seconds = time.perf_counter() - began
    return Reach(node["NodeManagerAddress"], found, SIZE_BYTES / seconds, None)


def _block() -> Any:
    return torch.zeros(SIZE_BYTES, dtype=torch.uint8).numpy()


def _size(block: Any) -> int:
    return len(block)

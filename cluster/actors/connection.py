"""Reaching or starting a Ray cluster, and reserving a share of it."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray.experimental.internal_kv import _internal_kv_get
from ray.util import client
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from metadist.cluster.actors.errors import ConnectError, ResourcesError
from metadist.signals import signals_held

log = logging.getLogger("metadist.cluster")


def connect(
    address: str | None, num_cpus: float, show_worker_output: bool, object_store_bytes: int | None
) -> bool:
    """Whether this call made the connection, so that the caller must call `disconnect`.

    An existing connection of this process is used as it is. Otherwise `address`, or the variable
    RAY_ADDRESS (set inside `ray job submit`), names a cluster; "local", or neither of them, starts
    a cluster on this machine, with all its CPUs, or `num_cpus` if that is more.
    """
    if ray.is_initialized():
        return False
    address = _resolved(address)
    # Calls that were dropped after a loss may fail, and Ray would print each of them.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    options: dict[str, Any] = {
        "address": address,
        "logging_level": logging.WARNING,
        "log_to_driver": show_worker_output,
    }
    if address == LOCAL:
        # Ray reports usage to its makers unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        token = _token_path()
        is_new = not token.exists()
        with (
            _quiet(TOKENS),
            _sigterm_kept(),
            _start_explained(),
        ):
            ray.init(
                num_cpus=max(_num_cores(), math.ceil(num_cpus)),
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                **options,
            )
        if is_new and token.exists():
            token.chmod(0o600)  # Ray leaves it readable for everybody
        with suppress(OSError):  # and its logs and sockets replaceable by everybody
            _session().chmod(0o700)
        return True
    try:
        _check_listening(address)
        if address.startswith(CLIENT):
            # Ray's client knows of a token only if it is told, and then waits for 30 s.
            with _quiet(TOKENS):
                maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        with _sigterm_kept():
            ray.init(**options)
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConnectError(
            f"address must name a running Ray cluster, got {address!r}: {first_sentence(error)}. "
            f"Is it up (`ray status`)? {token_advice()}"
        ) from error
    return True


LOCAL = "local"
CLIENT = "ray://"
TOKENS = "ray._private.authentication.authentication_token_setup"


def is_of_this_machine(address: str | None) -> bool:
    """Whether `connect` starts a cluster here for this address, which no other node joins."""
    return _resolved(address) == LOCAL


def _resolved(address: str | None) -> str:
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


@contextmanager
def _start_explained() -> Iterator[None]:
    """Within the block Ray's own limit of a start, a bare Exception after 30 s, is explained."""
    try:
        yield
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        raise ConnectError(
            "Ray must start on this machine within its own limit of 30 s, got no answer in time: "
            "the machine is busy or short of memory. Wait until it has less to do, or start Ray "
            "before the run (`ray start --head`) and give address='auto'"
        ) from error


@contextmanager
def connected(address: str | None, num_cpus: float) -> Iterator[None]:
    """Within the block there is a connection, see `connect`; one made for it is closed after it."""
    is_ours = connect(address, num_cpus, False, None)
    try:
        yield
    finally:
        if is_ours:
            disconnect()


def disconnect() -> None:
    """Close a connection that `connect` made, with the cluster if it was started for it.

    Ray's folder of that cluster is removed, but after an error, since its logs may tell the cause.
    """
    node: Any = ray._private.worker._global_node
    session = _session() if node is not None and node.is_head() else None
    ray.shutdown()
    if session is not None and sys.exc_info()[0] is None:
        shutil.rmtree(session, ignore_errors=True)


def is_gone() -> bool:
    """Whether the cluster of this connection does not answer any more; calls of it would hang."""
    try:
        _check_listening(ray.get_runtime_context().gcs_address)
    except OSError:
        return True
    except Exception:  # noqa: BLE001  # a kind of connection that does not say: assume the best
        return False
    return False


def calls_kept_whole() -> AbstractContextManager[None]:
    """Within the block the signals that stop a run wait, where Ray's client is connected.

    Its calls are Python code with threads and locks: an exception that a signal raises there is
    lost in a destructor, or leaves a lock that the next call waits for without end.
    """
    return signals_held() if client.ray.is_connected() else nullcontext()


def draining_nodes() -> frozenset[str]:
    """The ids of the nodes that Ray has announced to stop, as before a preemption."""
    # Ray has no public call for it; its own Ray Train asks in this way. It would not return
    # without a head.
    if not ray.is_initialized() or is_gone():
        return frozenset()
    try:
        return frozenset(ray._private.state.state.get_draining_nodes())
    except Exception as error:  # noqa: BLE001  # without it, a node that stops is just lost
        log.debug("Ray does not say which nodes will stop: %r", error)
        return frozenset()


def this_node() -> str:
    """The id of the node that this process is on; empty outside of Ray."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def _check_listening(address: str) -> None:
    """Raise OSError if nothing listens there: Ray itself would try for minutes.

    "ray://host:port" is Ray's client, of which the same holds.
    """
    host, _, port = address.removeprefix(CLIENT).rstrip("/").rpartition(":")
    if host and port.isdigit() and "://" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Within the block the handler of SIGTERM stays: Ray's would end a run without checkpoint."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Within the block that logger is off: every local start would report that tokens are on."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _session() -> Path:
    """Ray's folder of this cluster, with its logs and sockets."""
    node: Any = ray._private.worker._global_node
    return Path(node.get_session_dir_path())


def first_sentence(error: Exception) -> str:
    """What Ray says without its advice, which is longer."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].rstrip(".")


def token_advice() -> str:
    """What to type where a cluster does not take the token of this machine."""
    path = _token_path()
    mode = "export RAY_AUTH_MODE=token"
    if not (os.environ.get("RAY_AUTH_TOKEN") or path.is_file()):
        return (
            f"This machine has no token: type `mkdir -p {path.parent} && scp HEAD:.ray/auth_token "
            f"{path} && {mode}`, HEAD being the machine where `ray start --head` ran; for a "
            "cluster to be started here, `ray get-auth-token --generate` makes one"
        )
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return f"This machine has a token that it does not show: type `{mode}`"
    return (
        f"Its token is that of {'RAY_AUTH_TOKEN' if os.environ.get('RAY_AUTH_TOKEN') else path}: "
        "compare it with that of the head, `ray get-auth-token` there and here"
    )


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def reserve(
    bundles: Sequence[dict[str, float]],
    timeout_s: float,
    option: str = "num_workers",
    can_grow: bool = True,
) -> PlacementGroup:
    """A reservation of `bundles`, each on one node; on few nodes where possible.

    Args:
        bundles: The resources, one bundle for each worker.
        timeout_s: How long to wait for them.
        option: The option that says how many, for the error.
        can_grow: Whether nodes may join; if not, nothing that all nodes lack is waited for. What no
            single node has is waited for only where an autoscaler may start one.

    Raises:
        ResourcesError: They are not free within `timeout_s`, or never will be; nothing is left
            reserved.
    """
    if not can_grow and (lacking := _lacking(bundles)):
        raise ResourcesError(
            f"{option}={len(bundles)} must have room on this machine, which is the whole cluster, "
            f"got {_shortage(bundles)}: lower {option}"
            + (" or gpus_per_worker, or use device='cpu'" if "GPU" in lacking else "")
            + ", or give the address of a cluster that has them"
        )
    check_room(bundles[0], f"{option}={len(bundles)}")
    group = placement_group(list(bundles), strategy="PACK")
    try:
        if group.wait(min(2.0, timeout_s)):
            return group
        log.info("waiting for %s", _shortage(bundles))
        if group.wait(max(0.0, timeout_s - 2.0)):
            return group
    except BaseException:
        remove_placement_group(group)
        raise
    shortage = _shortage(bundles)
    remove_placement_group(group)
    raise ResourcesError(
        f"{option}={len(bundles)} must be free within start_timeout_s={timeout_s:g}, "
        f"got {shortage}: lower {option}, cpus_per_worker or gpus_per_worker, or add nodes"
    )


def demand(bundle: dict[str, float]) -> PlacementGroup:
    """A reservation that may come later; until then Ray's autoscaler sees it as demand."""
    return placement_group([bundle])


def check_room(bundle: Mapping[str, float], option: str) -> None:
    """Raise ResourcesError for what no node has, free or not, unless an autoscaler may start one.

    Args:
        bundle: The resources that each worker needs on its node.
        option: The option that asks for them, with its value.
    """
    for node in _nodes():
        if all(node["Resources"].get(name, 0) + 1e-6 >= bundle[name] for name in bundle):
            return
    if _has_autoscaler():
        return
    raise ResourcesError(
        f"{option} must have nodes with {_in_words(bundle)} each, got {_nodes_in_words()}, and "
        "none of them is of a group of Ray's autoscaler, which could start others: lower "
        "cpus_per_worker or gpus_per_worker"
        + (", use device='cpu'" if bundle.get("GPU") else "")
        + ", or let such nodes join first"
    )


_NODE_GROUP = "ray.io/node-group"
"""The label of nodes that `ray up`, KubeRay and the like start; the constant of Ray is private."""


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _has_autoscaler() -> bool:
    """Whether an autoscaler may start nodes."""
    if any(_NODE_GROUP in node.get("Labels", {}) for node in _nodes()):
        return True
    # Ray's first autoscaler (the default before Ray 2.50) labels no nodes, and there is no public
    # call. Its report, from which `ray status` is printed, has the number of nodes of each type;
    # where nothing starts nodes, each is of a type of its own.
    try:
        report = json.loads(_internal_kv_get("__autoscaling_status"))
        kinds = report["autoscaler_report"]["active_nodes"]
    except (TypeError, ValueError, KeyError):
        return False
    return any(not kind.startswith("node_") for kind in kinds)


def _in_words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{name}: {resources.get(name, 0):g}" for name in ("CPU", "GPU"))


def _nodes_in_words() -> str:
    kinds = Counter(_in_words(node["Resources"]) for node in _nodes())
    return "nodes with " + ", ".join(f"{kind} ({count}x)" for kind, count in sorted(kinds.items()))


def _lacking(bundles: Sequence[dict[str, float]]) -> list[str]:
    """The resources of which the bundles need more than there is in the cluster."""
    total = ray.cluster_resources()
    return [
        name
        for name in bundles[0]
        if math.fsum(bundle[name] for bundle in bundles) > total.get(name, 0) + 1e-6
    ]


def _shortage(bundles: Sequence[dict[str, float]]) -> str:
    """The resources that are needed, in the cluster, and free, in words."""
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [
        f"{name}: {sum(bundle[name] for bundle in bundles):g} needed ({bundles[0][name]:g} each), "
        f"{total.get(name, 0):g} in the cluster, {free.get(name, 0):g} free"
        for name in bundles[0]
    ]
    return "; ".join(parts)

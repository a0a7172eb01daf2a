"""`Worker`: computes leases; becomes an actor where it is created."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

import ray
import torch
from ray import cloudpickle

from metadist.cluster.buffers import Array, Kept, OuterSpec, read_only, to_array, to_tensor
from metadist.lease import Lease, LeaseResult, Workload, pick_device


class WorkerInfo(NamedTuple):
    """Where a worker runs; `device` names the hardware."""

    name: str
    device: str
    host: str
    pid: int


class Worker:
    """Holds the workload and its own copy of x on its device between leases.

    Args:
        name: in reports and errors.
        device: "auto": the GPU that Ray gave to this actor, else the CPU; or "cpu", "cuda".
    """

    def __init__(self, name: str, device: str) -> None:
        self._name = name
        self._requested_device = device

    def setup(self, payload: bytes, spec: OuterSpec) -> WorkerInfo:
        """Where this worker runs, ready to compute leases of another workload.

        Args:
            payload: the workload, pickled by `runtime_env.pickle_by_value`.
            spec: names, shapes and dtype of x.
        """
        device = pick_device(worker_device(self._requested_device))
        self._workload: Workload = cloudpickle.loads(payload)
        self._flat = torch.zeros(spec.num_elements, dtype=spec.dtype, device=device)
        self._spec = spec
        self._outer = spec.views(self._flat)
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return WorkerInfo(self._name, hardware, socket.gethostname(), os.getpid())

    def compute(
        self, lease: Lease, kept: Kept | None, *flats: Array
    ) -> tuple[LeaseResult | Array, ...]:
        """(the result, one buffer: sums of hypergradients, then states) of `lease`.

        Args:
            lease: which tasks.
            kept: what else it needs, where the workload is synchronous.
            flats: the shards of x, in order; there is one.
        """
        for part, flat in zip(self._flat.split([len(f) for f in flats]), flats, strict=True):
            part.copy_(read_only(flat))
        device = self._flat.device
        previous, states = None, {}
        if kept is not None:
            states = {i: to_tensor(state).to(device) for i, state in kept.states.items()}
            if kept.previous is not None:
                previous = self._spec.views(to_tensor(kept.previous).to(device))
        computed = self._workload.compute(lease, self._outer, previous, states)
        total = computed.total
        if computed.states:  # otherwise it would be copied for nothing
            total = torch.cat([total, *computed.states.values()])
        return computed.result, to_array(total)


def worker_device(device: str) -> str:
    """The device for an actor: a GPU only if Ray gave it one, though it may see others."""
    if device != "auto":
        return device
    return "cuda" if ray.get_gpu_ids() else "cpu"

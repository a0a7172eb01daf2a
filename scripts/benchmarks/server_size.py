"""The cost of a step of a large outer variable without computing: time and memory.

    python scripts/benchmarks/server_size.py  200 million elements, about 10 GB of memory
    python scripts/benchmarks/server_size.py --num_params 20e6  smaller
    python scripts/benchmarks/server_size.py --num_shards 2 --compression bfloat16
    python scripts/benchmarks/server_size.py --num_params 12.5e6 --example  and Ray's own example

One worker sends a sum of hypergradients (push), the parameter server steps x and publishes it
(apply), the worker gets x (pull), by the code of a run. Times are medians, in units of a plain copy
of as many bytes in the same process in the same turn. "must" is the data to move in that unit,
where a copy is one read and one write of each element; it counts

    push     the sum into shared memory
    apply    the sum into the server's own memory, the step (reads and writes of x, its gradient and
             its moments), x into shared memory
    pull     x out of shared memory

Ray's example is the parameter server of its documentation (synchronous, one worker) with as many
parameters, in the same turns: gradients as a list of numpy arrays, weights as a state_dict.

Memory is the peak of each process without what it shares, and the peak of the shared memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table

from metadist.cluster.actors.buffers import OuterSpec, PackedState, split_state
from metadist.cluster.actors.failure import Failures
from metadist.cluster.actors.options import Server
from metadist.cluster.actors.runtime_env import pickle_by_value
from metadist.cluster.parameter_server.compression import Compression
from metadist.cluster.parameter_server.server import ParameterServer
from metadist.cluster.parameter_server.supervisor import Supervisor
from metadist.cluster.parameter_server.transport import Pulled, Pushed, Transport
from metadist.cluster.parameter_server.worker import Worker
from metadist.compute import Compute
from metadist.optimizer import OuterOptimizer
from metadist.outer import Contribution, LeaseResult, shard_bounds

OPTIMIZERS = {
    "sgd": (OuterOptimizer("sgd", lr=1e-3, clip_norm=1.0), 1.5),
    "adam": (OuterOptimizer("adam", lr=1e-3, clip_norm=1.0), 3.5),
    "adam, loop": (OuterOptimizer("adam", lr=1e-3, clip_norm=1.0, options={"fused": False}), 3.5),
}
"""How many copies' worth of memory one step of each reads and writes."""
START_S = 600.0


class SizedWorker(Worker):
    """A worker that has computed a lease."""

    def setup_sum(self) -> None:
        """Make a sum to send."""
        torch.set_num_threads(1)
        self._total = torch.ones_like(self._flat)

    def push(self, number: int) -> tuple[float | Pushed, ...]:
        """(seconds of a copy of the sum, what is sent for the sum)."""
        began = time.perf_counter()
        self._flat.copy_(self._total)
        seconds = time.perf_counter() - began
        return seconds, *self.send(Contribution(LeaseResult(number, number, 1), self._total))

    def pull(self, *pulled: Pulled) -> None:
        """Keep this x."""
        self.load(pulled)


class Peaks:
    """The most memory that processes had, looked at every 20 ms.

    Args:
        pids: by name.
    """

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self.own: dict[str, int] = dict.fromkeys(pids, 0)
        self.shared = 0
        """The peak of one of them in shared memory, all of which the raylet keeps."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            for name, pid in self._pids.items():
                sizes = memory_bytes(pid)
                self.own[name] = max(self.own[name], sizes["RssAnon"])
                self.shared = max(self.shared, sizes["RssShmem"])


def memory_bytes(pid: int) -> dict[str, int]:
    """RssAnon and RssShmem of a process."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in lines if line[0].startswith("Rss")}


def raylet_pid() -> int:
    """The process id of the child of this process that keeps the shared memory."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        name, parent = (
            stat[stat.index("(") + 1 : stat.rindex(")")],
            stat.rpartition(")")[2].split()[1],
        )
        if name == "raylet" and int(parent) == os.getpid():
            return int(folder.name)
    raise RuntimeError("Ray has no raylet here")


class Example:
    """Both actors of Ray's example, but that gradients are at hand: optimiser, model, messages.

    Args:
        num_params: The parameters of the model.
        optimizer: The name of a class of torch.optim.
    """

    def __init__(self, num_params: int, optimizer: str) -> None:
        torch.set_num_threads(1)
        self.model = torch.nn.ParameterList([torch.zeros(num_params)])
        self.optimizer = getattr(torch.optim, optimizer)(self.model.parameters(), lr=1e-3)
        self.model[0].grad = torch.ones(num_params)

    def apply_gradients(self, *gradients: list[Any]) -> dict[str, torch.Tensor]:
        """Of the server."""
        summed = [np.stack(of_one).sum(axis=0) for of_one in zip(*gradients, strict=True)]
        self.optimizer.zero_grad()
        for gradient, parameter in zip(summed, self.model.parameters(), strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self.optimizer.step()
        return self.get_weights()

    def get_weights(self) -> dict[str, torch.Tensor]:
        """Of the server."""
        return {name: leaf.cpu() for name, leaf in self.model.state_dict().items()}

    def compute_gradients(self, weights: dict[str, torch.Tensor]) -> list[Any]:
        """Of the worker."""
        self.model.load_state_dict(weights)
        grads = [parameter.grad for parameter in self.model.parameters()]
        return [grad.data.cpu().numpy() for grad in grads if grad is not None]


class ExampleRounds:
    """Rounds of Ray's example."""

    def __init__(self, num_params: int, optimizer: str) -> None:
        actor: Any = ray.remote(Example).options(num_cpus=0)
        self._server, self._worker = (actor.remote(num_params, optimizer) for _ in range(2))
        self._weights = self._server.get_weights.remote()

    def __call__(self) -> None:
        """One round."""
        gradients = self._worker.compute_gradients.remote(self._weights)
        self._weights = self._server.apply_gradients.remote(gradients)
        ray.wait([self._weights], fetch_local=False)

    def close(self) -> None:
        """Free its memory."""
        ray.kill(self._server)
        ray.kill(self._worker)


def measure(
    supervisor: Supervisor,
    worker: Any,
    num_shards: int,
    repeats: int,
    example: ExampleRounds | None = None,
) -> dict[str, float]:
    """Median ratios to a copy, by phase, and the seconds of a copy; after two warm-up turns."""
    ratios: dict[str, list[float]] = {"push": [], "apply": [], "pull": [], "all": []}
    if example is not None:
        ratios |= {"example": [], "example / all": []}
    copies = []
    for turn in range(2 + repeats):
        times = [time.perf_counter()]
        copied, *totals = worker.push.options(num_returns=1 + num_shards).remote(turn)
        ray.wait(totals, num_returns=num_shards, fetch_local=False)
        copy_s = ray.get(copied)
        times.append(time.perf_counter())
        _, outer = supervisor.apply([LeaseResult(turn, turn, 1)], [1.0], [tuple(totals)])
        times.append(time.perf_counter())
        del totals
        ray.get(worker.pull.remote(*outer))
        times.append(time.perf_counter())
        push_s, apply_s, pull_s = (after - before for before, after in itertools.pairwise(times))
        if turn >= 2:
            copies.append(copy_s)
            all_s = push_s - copy_s + apply_s + pull_s
            taken = {"push": push_s - copy_s, "apply": apply_s, "pull": pull_s, "all": all_s}
            for name, seconds in taken.items():
                ratios[name].append(seconds / copy_s)
        if example is not None:
            began = time.perf_counter()
            example()
            example_s = time.perf_counter() - began
            if turn >= 2:
                ratios["example"].append(example_s / copy_s)
                ratios["example / all"].append(example_s / all_s)
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    return {**medians, "copy_s": statistics.median(copies)}


def run(
    num_params: int,
    num_shards: int,
    compression: Compression,
    transport: Transport,
    repeats: int,
    optimizers: list[str],
    with_example: bool,
) -> None:
    """Measure and print."""
    console = Console(soft_wrap=True)
    size_bytes = 4 * num_params
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=(18 if with_example else 9) * size_bytes // 2 + (100 << 20),
    )
    bounds = shard_bounds(num_params, num_shards)
    spec = OuterSpec({"x": (num_params,)}, torch.float32)
    worker: Any = ray.remote(SizedWorker).options(num_cpus=0).remote("worker")
    payload = pickle_by_value(SimpleNamespace(compute=Compute(device="cpu")))
    ray.get(worker.setup.remote(payload, spec, bounds, compression, transport))
    ray.get(worker.setup_sum.remote())
    supervisor = Supervisor(
        lambda number: ray.remote(ParameterServer).options(num_cpus=0).remote(),
        Failures(),
        Server(snapshot_every=1 << 30, timeout_s=None),
        start_timeout_s=START_S,
    )
    state = PackedState(np.zeros(num_params, dtype=np.float32), {}, 0, 0, (), {}, {})
    title = f"{num_params:,} numbers, {compression}, {transport.name}"
    times = Table("", "x a copy", "must", "ratio", title=title)
    peaks: dict[str, int] = {}
    shared = 0  # what is freed there is used again, so it is the most that was in use
    for name in optimizers:
        optimizer, moved = OPTIMIZERS[name]
        parts = split_state(state, bounds)
        supervisor.start(parts, spec.of_slices(bounds), optimizer, 1, None, transport)
        pids = {"driver": os.getpid(), "worker": pid_of(worker)}
        pids |= {
            f"server {number}": pid_of(actor) for number, actor in enumerate(supervisor.servers)
        }
        torch_name = {"sgd": "SGD"}.get(name, "Adam")
        example = ExampleRounds(num_params, torch_name) if with_example else None
        with Peaks(pids | {"raylet": raylet_pid()}) as watched:
            found = measure(supervisor, worker, num_shards, repeats, example)
        peaks = {who: max(peaks.get(who, 0), size) for who, size in watched.own.items()}
        shared = max(shared, watched.shared)
        must = {"push": 1.0, "apply": 1.0 + moved + 1.0, "pull": 1.0}
        for phase, least in must.items():
            label = phase if phase != "apply" else f"apply, {name}"
            times.add_row(label, f"{found[phase]:.2f}", f"{least:g}", f"{found[phase] / least:.2f}")
        total, least = found["all"], sum(must.values())
        copy = f"a copy takes {1000 * found['copy_s']:.1f} ms"
        times.add_row(
            f"all, {name}; {copy}",
            f"{total:.2f}",
            f"{least:g}",
            f"{total / least:.2f}",
            end_section=example is None,
        )
        if example is not None:
            ratio = f"{found['example / all']:.2f} x all"
            label = f"Ray's example, {torch_name}"
            times.add_row(label, f"{found['example']:.2f}", "", ratio, end_section=True)
            example.close()
    memory = Table("", "MB", "x the size of x", title="memory at the highest")
    for who, size in {**peaks, "shared memory": shared}.items():
        memory.add_row(who, f"{size / 1e6:.0f}", f"{size / size_bytes:.2f}")
    console.print(times)
    console.print(memory)
    supervisor.stop()
    ray.shutdown()


def pid_of(actor: Any) -> int:
    """The process of an actor."""
    pid: int = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return pid


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_params", type=lambda text: int(float(text)), default=200_000_000)
    parser.add_argument("--num_shards", type=int, default=1)
    parser.add_argument("--compression", choices=get_args(Compression), default="none")
    parser.add_argument("--transport", choices=["object_store", "nixl"], default="object_store")
    parser.add_argument("--repeats", type=int, default=5)
    every = list(OPTIMIZERS)
    parser.add_argument("--optimizers", choices=every, nargs="+", default=every)
    parser.add_argument("--example", action="store_true", help="measure Ray's own example too")
    options = parser.parse_args()
    run(
        options.num_params,
        options.num_shards,
        options.compression,
        Transport(options.transport),
        options.repeats,
        options.optimizers,
        options.example,
    )


if __name__ == "__main__":
    main()

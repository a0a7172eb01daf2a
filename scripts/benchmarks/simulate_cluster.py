"""How throughput and staleness grow with the number of workers, policy by policy.

    python scripts/benchmarks/simulate_cluster.py  simulated to 1,000 workers, docs/scaling_*.png
    python scripts/benchmarks/simulate_cluster.py measure  1 to 4 workers on Ray beside it
    python scripts/benchmarks/simulate_cluster.py waiting  how long workers wait
    python scripts/benchmarks/simulate_cluster.py --help  the cluster that is simulated

The policies and the ledger are those of `metadist.cluster`; docs/scaling.md explains the figures.
Simulating takes a minute and is the same every time; measuring takes some minutes and starts Ray,
with workers that sleep instead of computing, and messages of real size.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

from metadist.compute import Compute

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import ray
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from metadist import Batch, OuterOptimizer, Params, Problem, Task
from metadist.algorithms import ITD
from metadist.cluster import ASP, BSP, SSP, Buffered, Policy, RayExecutor, View, Workers
from metadist.cluster.parameter_server.simulation import (
    Costs,
    Outcome,
    SimulatedWorkers,
    Step,
    simulate,
)
from metadist.executor import StepReport
from metadist.outer import OuterVariable
from metadist.workload import Workload

FOLDER = Path(__file__).resolve().parents[2] / "docs"
console = Console(soft_wrap=True)

NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
SHARDS = (1, 4, 16)
POLICIES: dict[str, Callable[[int], Policy]] = {
    "bsp": lambda num: BSP(),
    "ssp, 2 x workers": lambda num: SSP(2 * num),
    "asp": lambda num: ASP(),
    "buffered, workers / 8": lambda num: Buffered(max(1, num // 8)),
}
"""By number of workers, which is also the number of leases in a meta-batch."""

QUIET = Costs(
    driver_s=1e-3, worker_s=2e-3, worker_byte_s=1e-9, step_s=1.5e-3, add_byte_s=0.2e-9,
    step_byte_s=1.7e-9,
)  # fmt: skip
"""Costs of single operations on two quiet Xeon cores at 2.5 GHz: a round trip takes 0.7 ms, adding
5 GB/s, a copy into shared memory 1 GB/s, Adam and a copy of x 1.7 ns per byte."""


def run(policy: str, num: int, workers: SimulatedWorkers, costs: Costs) -> Outcome:
    """A simulated run of `num` workers that is long enough for steady results."""
    changed = replace(workers, num=num)
    return simulate(POLICIES[policy](num), num, changed, costs, max(1000, 12 * num))


def ideal(num: Sequence[int], workers: SimulatedWorkers) -> list[float]:
    """Leases per second if only computing took time, and no worker were lost or slow."""
    return [count / workers.compute_s for count in num]


def show_policies(workers: SimulatedWorkers, costs: Costs) -> None:
    """A table and a picture of throughput and staleness of every policy."""
    table = Table("workers", "policy", "leases/s", "of ideal", "staleness mean", "95 %", "server",
                  title="simulated")  # fmt: skip
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.loglog(NUMBERS, ideal(NUMBERS, workers), "--", color="grey", label="ideal")
    for policy, marker in zip(POLICIES, "o^sD", strict=True):
        outcomes = [run(policy, num, workers, costs) for num in NUMBERS]
        for num, outcome in zip(NUMBERS, outcomes, strict=True):
            speed, ages = outcome.leases_per_s, outcome.staleness
            table.add_row(
                str(num), policy, f"{speed:.3g}", f"{speed * workers.compute_s / num:.0%}",
                f"{ages.mean():.1f}", f"{np.percentile(ages, 95):.0f}",
                f"{outcome.server_share:.0%}",
            )  # fmt: skip
        left.loglog(NUMBERS, [o.leases_per_s for o in outcomes], marker=marker, label=policy)
        means = [o.staleness.mean() for o in outcomes]
        right.plot(NUMBERS, means, marker=marker, label=policy)
    right.set_xscale("log")
    right.set_yscale("symlog", linthresh=1)
    right.set_ylim(bottom=-0.2)
    label(left, "workers", "leases applied per second")
    label(right, "workers", "mean staleness, versions")
    left.legend()
    save(figure, "scaling_policies.png")
    console.print(table)


def show_server(workers: SimulatedWorkers, costs: Costs) -> None:
    """A picture of the effect of shards, and of where one server saturates by the size of x."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    left.loglog(NUMBERS, ideal(NUMBERS, workers), "--", color="grey", label="ideal")
    table = Table("shards", "policy", *map(str, NUMBERS), title="leases/s by number of workers")
    for colour, num_shards in enumerate(SHARDS):
        sharded = replace(costs, num_shards=num_shards)
        for policy, style in (("asp", "o-"), ("bsp", "s:")):
            speeds = [run(policy, num, workers, sharded).leases_per_s for num in NUMBERS]
            name = f"{shards(num_shards)}, {policy}"
            left.loglog(NUMBERS, speeds, style, color=f"C{colour}", label=name)
            table.add_row(str(num_shards), policy, *(f"{speed:.3g}" for speed in speeds))
    console.print(table)
    label(left, "workers", "leases applied per second")
    left.legend()
    sizes = [2.0**k * 1e6 for k in range(10)]
    for num_shards in SHARDS:
        limits = [
            workers.compute_s / replace(costs, size_bytes=size, num_shards=num_shards).apply_s(1)
            for size in sizes
        ]
        megabytes = [size / 1e6 for size in sizes]
        right.loglog(megabytes, limits, marker="o", label=shards(num_shards))
    label(right, "size of x, MB", "workers that keep the server busy, asp")
    right.legend()
    save(figure, "scaling_server.png")


def show_prefetch(workers: SimulatedWorkers, costs: Costs) -> None:
    """A table of the effect of prefetching leases, below saturation of the server."""
    table = Table("workers", "policy", "waiting", "leases/s", "staleness",
                  title="simulated, without and with prefetch")  # fmt: skip
    for num in (2, 4, 6):
        policies: dict[str, Policy] = {
            "bsp": BSP(), "asp": ASP(), "ssp, 0": SSP(0), f"ssp, {num}": SSP(num),
            f"ssp, {3 * num}": SSP(3 * num), f"buffered, {num}": Buffered(num),
        }  # fmt: skip
        for name, policy in policies.items():
            without, ahead = (
                simulate(policy, 4 * num, replace(workers, num=num), costs, 1000, prefetch=prefetch)
                for prefetch in (0, 1)
            )
            table.add_row(
                str(num), name,
                f"{without.waiting_share:.1%}, {ahead.waiting_share:.1%}",
                f"{without.leases_per_s:.2f}, {ahead.leases_per_s:.2f}",
                f"{without.staleness.mean():.2f}, {ahead.staleness.mean():.2f}",
            )  # fmt: skip
    console.print(table)


def shards(num: int) -> str:
    """The label of a number of shards."""
    return f"{num} shard{'s' * (num > 1)}"


def label(axes: Axes, x: str, y: str) -> None:
    """Name the axes; logarithmic ones get plain numbers."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "linear":
            axis.set_major_formatter("{x:g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def save(figure: Figure, name: str) -> None:
    """Write a picture into docs/."""
    figure.savefig(FOLDER / name, dpi=110)
    plt.close(figure)
    console.print(f"wrote docs/{name}")


# On Ray


@dataclass(frozen=True)
class Wide(Problem):
    """A trivial regression, with many elements that travel with it."""

    num_idle: int

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"weight": torch.zeros(4), "idle": torch.zeros(self.num_idle)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"weight": outer["weight"]}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.tensors
        return (inputs @ inner["weight"] - targets).square().mean()

    outer_loss = inner_loss


@dataclass(frozen=True)
class Sleeping:
    """Tasks that sleep for the time of the simulated leases."""

    workers: SimulatedWorkers

    def sample(self, index: int) -> Task:
        time.sleep(float(self.workers.durations(4096, 0)[index % 4096]))
        batch = Batch.of(torch.full((4, 4), 0.1), torch.ones(4))
        return Task(batch, batch, index)


class Chosen(Policy):
    """Whichever policy is `current`, so that one set of processes serves all."""

    def __init__(self) -> None:
        self.current: Policy = ASP()

    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        return self.current.leases_to_apply(view)

    def may_issue(self, view: View) -> bool:
        return self.current.may_issue(view)

    def leases_per_step(self, meta_batch: int) -> int:
        return self.current.leases_per_step(meta_batch)


ADAM = OuterOptimizer("adam", lr=1e-3)
LEASES_PER_STEP = 4
NUM_LEASES = 40
ON_RAY: tuple[Policy, ...] = (BSP(), ASP(), SSP(4), Buffered(2))
ACTORS = (1, 2, 4)


class Cluster:
    """Some workers on Ray; use it as a context manager."""

    def __init__(self, num: int, prefetch: int = 1) -> None:
        self._num = num
        self._policy = Chosen()
        self._executor = RayExecutor(
            Workers(num, start_timeout_s=300), policy=self._policy, prefetch=prefetch
        )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.close()

    def run(self, policy: Policy, num_params: int, sleep_s: float, leases_per_step: int) -> Outcome:
        """A real run, in the form of the simulation's report."""
        outcome = Outcome(self._num)
        began = None
        for report in self.reports(policy, num_params, sleep_s, leases_per_step, SPREAD):
            now = time.perf_counter()
            began = now - report.seconds if began is None else began
            outcome.steps.append(Step(now - began, report.step.applied, report.step.staleness))
        return outcome

    def reports(
        self,
        policy: Policy,
        num_params: int,
        sleep_s: float,
        leases_per_step: int,
        spread: float = 0.0,
        optimizer: OuterOptimizer = ADAM,
    ) -> Iterator[StepReport]:
        """The steps of a run of `NUM_LEASES` leases."""
        problem = Wide(num_params)
        workload = Workload(
            problem,
            Sleeping(SimulatedWorkers(self._num, sleep_s, spread)),
            ITD(inner_steps=1, inner_lr=0.1),
            meta_batch_size=leases_per_step,
            report_every=1_000_000,
            compute=Compute(device="cpu"),
        )
        self._policy.current = policy
        state = OuterVariable(problem.init_outer(torch.Generator()), optimizer).state()
        self._executor.start(workload, optimizer, state)
        return self._executor.run(NUM_LEASES // policy.leases_per_step(leases_per_step))


SPREAD = 0.3
SLEEP_S = 0.1


def measured_costs(seconds: dict[tuple[str, int], float], num_params: int) -> Costs:
    """The costs of Ray here, from runs without sleep of a small x and one of `num_params`.

    One worker tells the sum of all, the same with 8 leases to a step what a step adds to it, and
    the most workers what is not done side by side.

    Args:
        seconds: per lease, by ("one" | "eight" | "many", numbers in x).
        num_params: numbers in the large x.
    """

    def parts(params: int) -> tuple[float, float, float]:
        one = seconds["one", params]
        serial = min(one, seconds["many", params])
        step = min(max((one - seconds["eight", params]) * 8 / 7, 0.0), serial)
        return one - serial, serial - step, step

    small, large = parts(SMALL), parts(num_params)
    per_byte = [max(0.0, b - a) / (4 * num_params) for a, b in zip(small, large, strict=True)]
    return Costs(
        driver_s=small[1], worker_s=small[0], worker_byte_s=per_byte[0], step_s=small[2],
        add_byte_s=per_byte[1], step_byte_s=per_byte[2],
    )  # fmt: skip


SMALL = 1000
"""Elements of an x whose size takes no time."""


def start_ray(num_cpus: int) -> None:
    """A cluster on this machine."""
    # Ray's processes give way to all others, which on a busy machine would be what is measured.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False,
        logging_level=logging.ERROR,
        _system_config={"preload_python_modules": ["torch", "metadist.cluster"]},
    )  # fmt: skip


def waiting(num_params: int, step_s: float) -> None:
    """The share of their time in which two workers have nothing to compute, with steps of `step_s`.

    All leases take the same time, so that under bsp nobody waits for a slower one.
    """
    num = 2
    start_ray(num)
    names = ("x, MB", "policy", "leases a step", "prefetch", "adam", "waiting", "leases/s")
    title = f"{num} workers, {step_s:g} s of sleep each a step"
    table = Table(*names, "staleness", title=title)
    loop = OuterOptimizer("adam", lr=1e-3, options={"fused": False})
    for prefetch in (0, 1):
        with Cluster(num, prefetch) as cluster:
            cluster.run(ASP(), num_params, 0.0, 1)  # processes that have done everything once
            for size, (policy, leases), optimizer in itertools.product(
                (SMALL, num_params), ((BSP(), num), (BSP(), 4 * num), (ASP(), 1)), (ADAM, loop)
            ):
                sleep_s = step_s * min(num / leases, 1)
                found = list(cluster.reports(policy, size, sleep_s, leases, optimizer=optimizer))
                found = found[1:]  # in the first step nobody has x yet
                seconds = sum(report.seconds for report in found)
                waited = sum(report.waiting_s for report in found) / seconds / num
                speed = sum(len(report.results) for report in found) / seconds
                ages = [age for report in found for age in report.step.staleness]
                table.add_row(
                    f"{4e-6 * size:.3g}", type(policy).__name__.lower(), str(leases), str(prefetch),
                    "fused" if optimizer is ADAM else "loop", f"{waited:.1%}", f"{speed:.2f}",
                    f"{np.mean(ages):.2f}",
                )  # fmt: skip
    ray.shutdown()
    console.print(table)


def measure(num_params: int) -> None:
    """Compare simulated with measured runs on this machine."""
    start_ray(max(ACTORS))
    seconds: dict[tuple[str, int], float] = {}
    real: dict[tuple[int, str, int], Outcome] = {}
    for num in ACTORS:
        with Cluster(num, prefetch=0) as cluster:  # as it is simulated
            cluster.run(ASP(), num_params, 0.0, 1)  # processes that have done everything once
            for params in (SMALL, num_params):
                if num == 1:
                    seconds["one", params] = 1 / cluster.run(ASP(), params, 0.0, 1).leases_per_s
                    seconds["eight", params] = 1 / cluster.run(BSP(), params, 0.0, 8).leases_per_s
                if num == max(ACTORS):
                    seconds["many", params] = 1 / cluster.run(ASP(), params, 0.0, 1).leases_per_s
                for policy in ON_RAY:
                    found = cluster.run(policy, params, SLEEP_S, LEASES_PER_STEP)
                    real[params, str(policy), num] = found
            console.print(f"{num} workers measured, load {os.getloadavg()[0]:.1f}")
    ray.shutdown()
    costs = measured_costs(seconds, num_params)
    console.print(costs)
    compare(real, costs, num_params)


def compare(real: dict[tuple[int, str, int], Outcome], costs: Costs, num_params: int) -> None:
    """A table and a picture of measured runs beside their simulation."""
    table = Table("x, MB", "policy", "workers", "leases/s", "simulated", "error", "staleness",
                  "simulated", title=f"{1000 * SLEEP_S:.0f} ms of sleep a lease")  # fmt: skip
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    errors = []
    for axis, params in zip(axes, (SMALL, num_params), strict=True):
        sized = replace(costs, size_bytes=4.0 * params)
        for number, policy in enumerate(ON_RAY):
            name = type(policy).__name__.lower()
            speeds = []
            for num in ACTORS:
                found = real[params, str(policy), num]
                workers = SimulatedWorkers(num, SLEEP_S, SPREAD)
                model = simulate(policy, LEASES_PER_STEP, workers, sized, NUM_LEASES)
                speeds.append((found.leases_per_s, model.leases_per_s))
                errors.append(model.leases_per_s / found.leases_per_s - 1)
                table.add_row(
                    f"{4e-6 * params:.3g}", name, str(num), f"{found.leases_per_s:.1f}",
                    f"{model.leases_per_s:.1f}", f"{errors[-1]:+.0%}",
                    f"{found.staleness.mean():.2f}", f"{model.staleness.mean():.2f}",
                )  # fmt: skip
            axis.plot(ACTORS, [pair[0] for pair in speeds], "o", color=f"C{number}")
            axis.plot(ACTORS, [pair[1] for pair in speeds], color=f"C{number}", label=name)
        axis.set_title(f"x of {4e-6 * params:.3g} MB: dots measured, lines simulated")
        axis.set_xticks(ACTORS)
        label(axis, "workers", "leases applied per second")
        axis.legend()
    console.print(table)
    size = np.abs(errors)
    console.print(f"error: median {np.median(size):.0%}, largest {size.max():.0%}")
    save(figure, "scaling_measured.png")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("simulate", "measure", "waiting"), default="simulate"
    )
    for option, default, text in (
        ("num_params", 5e6, "numbers in x, of 4 bytes"),
        ("compute_s", 0.5, "mean computing time of a lease"),
        ("spread", 0.3, "standard deviation of its logarithm"),
        ("slow_share", 0.02, "of the workers"),
        ("slow_factor", 3.0, "by which those are slower"),
        ("failure_h", 24.0, "mean computing time until a worker is lost"),
        ("replace_s", 30.0, "until another is in its place"),
        ("link_gbit", 10.0, "per second, of a node's network card"),
        ("per_node", 8, "workers on a node"),
    ):
        parser.add_argument(
            f"--{option}", type=type(default), default=default, help=f"{text} ({default:g})"
        )
    options = parser.parse_args()
    if options.what == "measure":
        measure(int(options.num_params))
        return
    if options.what == "waiting":
        waiting(int(options.num_params), options.compute_s)
        return
    workers = SimulatedWorkers(
        1, options.compute_s, options.spread, options.slow_share, options.slow_factor,
        3600 * options.failure_h, options.replace_s,
    )  # fmt: skip
    costs = replace(
        QUIET,
        size_bytes=4 * options.num_params,
        link_bytes_per_s=options.link_gbit * 1e9 / 8,
        workers_per_node=options.per_node,
        shard_s=QUIET.driver_s,
    )
    show_policies(workers, costs)
    show_server(workers, costs)
    show_prefetch(replace(workers, slow_share=0.0), costs)


if __name__ == "__main__":
    main()

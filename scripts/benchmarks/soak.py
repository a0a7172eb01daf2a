"""Whether memory grows in a long run: many tiny leases on Ray, through the real `Trainer`.

    python scripts/benchmarks/soak.py  20,000 leases on 2 workers, some minutes
    python scripts/benchmarks/soak.py --leases 200000  a longer run

The script samples the memory of every process and of the object store, prints a table, and exits
with 1 if any of them grew by more than `--tolerance_mib` in the second half. It counts the private
memory of a process; pages of the object store are counted once, there.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from rich.console import Console
from rich.table import Table

from metadist import OuterOptimizer, Trainer
from metadist.algorithms import ITD
from metadist.cluster import ASP, BSP, Policy, RayExecutor, Workers
from metadist.executor import StepReport
from metadist.models import MLP
from metadist.tasks import FewShotProblem, Sinusoid

NUM_SAMPLES = 40
LEASES_PER_STEP = 8
ROLES = {
    "ray::Worker": "workers",
    "ray::ParameterServer": "server",
    "raylet": "raylet",
    "gcs_server": "GCS",
}
"""Roles of the processes below this one, by the start of their command line."""

OURS = ("driver", "workers", "server", "object store")
"""Roles that must not grow. Ray's own processes are shown beside them."""

POLICIES: dict[str, Policy] = {"bsp": BSP(), "asp": ASP()}

Sample = Mapping[str, float]
"""MiB by role."""


class Sampled(RayExecutor):
    """Samples memory at a fixed interval of steps."""

    def __init__(self, every: int, **options: Any) -> None:
        super().__init__(**options)
        self._every = every
        self.samples: list[tuple[int, Sample]] = []
        """(leases applied, memory in use)."""

    def run(self, until_version: int) -> Iterator[StepReport]:
        for report in super().run(until_version):
            yield report
            if report.step.version % self._every == 0:
                self.samples.append((report.step.applied[-1] + 1, memory()))


def memory() -> Sample:
    """The memory in use now."""
    found: dict[str, float] = defaultdict(float)
    found["driver"] = private_mib("self")
    for pid in descendants():
        role = next((ROLES[word] for word in ROLES if command(pid).startswith(word)), None)
        if role:
            found[role] += private_mib(pid)
    reply = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
    found["object store"] = reply.store_stats.object_store_bytes_used / 2**20
    return found


def descendants() -> list[str]:
    """The ids of the processes below this one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            parents[stat.parent.name] = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
    below = {Path("/proc/self").resolve().name}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(below - {Path("/proc/self").resolve().name})


def command(pid: str) -> str:
    """The name of its program, or its name in Ray; empty if it has ended."""
    try:
        line = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""
    return line.rpartition("/")[2]


def private_mib(pid: str) -> float:
    """Memory that no other process shares; 0 if it has ended."""
    try:
        lines = Path("/proc", pid, "status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def growth(samples: Sequence[tuple[int, Sample]]) -> dict[str, float]:
    """MiB by role from the beginning to the end of the second half, each a mean of a quarter."""
    half = [sample for _, sample in samples[len(samples) // 2 :]]
    few = max(1, len(half) // 4)
    return {
        role: (sum(s[role] for s in half[-few:]) - sum(s[role] for s in half[:few])) / few
        for role in samples[-1][1]
    }


def soak(num_leases: int, policy: str, run_dir: str) -> list[tuple[int, Sample]]:
    """The samples of a run."""
    leases_per_step = LEASES_PER_STEP if policy == "bsp" else 1
    num_steps = num_leases // leases_per_step
    executor = Sampled(
        max(1, num_steps // NUM_SAMPLES),
        workers=Workers(num_workers=2),
        policy=POLICIES[policy],
        address="local",
    )
    trainer = Trainer(
        FewShotProblem(MLP(hidden=(256, 256)), loss="mse"),  # 260 kB: it goes through the store
        Sinusoid(k_shot=5, k_query=5),
        ITD(inner_steps=1, inner_lr=0.01),
        outer_optimizer=OuterOptimizer("adam", lr=1e-3),
        meta_batch_size=LEASES_PER_STEP,
        tasks_per_lease=1,
        executor=executor,
        run_dir=run_dir,
        val_sampler=Sinusoid(k_shot=5, k_query=5, split="val"),
        val_every=max(1, num_steps // 20),
        val_tasks=8,
        checkpoint_every=max(1, num_steps // 50),
        quiet=True,
    )
    trainer.fit(num_steps)
    return executor.samples


def show(samples: Sequence[tuple[int, Sample]], grown: Mapping[str, float]) -> Table:
    """Every fourth sample, and the growth."""
    table = Table("leases", *grown, title="MiB")
    for leases, sample in samples[3::4]:
        table.add_row(f"{leases:,}", *(f"{sample[role]:.1f}" for role in grown))
    table.add_section()
    table.add_row("second half", *(f"{grown[role]:+.1f}" for role in grown))
    return table


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leases", type=int, default=20_000)
    parser.add_argument("--policy", choices=tuple(POLICIES), default="bsp")
    parser.add_argument(
        "--tolerance_mib", type=float, default=8.0, help="largest growth of each role (8)"
    )
    options = parser.parse_args()
    logging.disable(logging.INFO)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        samples = soak(options.leases, options.policy, folder)
    grown = growth(samples)
    console = Console(soft_wrap=True)
    console.print(show(samples, grown))
    seconds = time.perf_counter() - began
    console.print(f"{samples[-1][0]:,} leases in {seconds:.0f} s, policy {options.policy}")
    too_much = {role: grown[role] for role in OURS if not grown[role] <= options.tolerance_mib}
    for role, mib in too_much.items():
        console.print(f"{role} grew by {mib:.1f} MiB, tolerance_mib={options.tolerance_mib:g}")
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())

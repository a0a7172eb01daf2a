"""Speed and memory, as ratios against named alternatives within one run.

    scripts/bench                          everything, about half an hour on two quiet cores
    scripts/bench --only aid-cg soba       one or several of --list
    scripts/bench --repeats 9              more repetitions

The ways of a contest start from the same numbers, and their results must agree before they are
timed. They take turns; times are medians in CPU seconds, so that load on the machine hardly changes
the ratios. Peak memory is that of a second call in a fresh process, above what the first call left.
Libraries to compare with are installed by scripts/bench into .venv/peers where they can be.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

import cleaning
import maml
import overhead
import torch
from contest import Contest, Job, print_peak_memory, run_contest, seconds_in_turns
from rich.console import Console
from rich.table import Table

from metadist import LocalExecutor, OuterOptimizer, TaskSampler
from metadist.algorithms import ITD
from metadist.cluster import Workers
from metadist.compute import Compute
from metadist.models import Conv4
from metadist.outer import OuterVariable
from metadist.tasks import FewShotProblem, Glyphs, Sinusoid
from metadist.workload import Workload

console = Console(width=120)


def bench_ray(repeats: int) -> Table:
    """The same outer steps in this process and on Ray."""
    from metadist.cluster import RayExecutor

    torch.manual_seed(0)
    problem = FewShotProblem(Conv4(width=64), adapt="all")
    workload = Workload(
        problem,
        Glyphs(n_way=5, k_shot=1, k_query=15),
        ITD(inner_steps=5, inner_lr=0.1),
        meta_batch_size=4,
        tasks_per_lease=2,
        compute=Compute(device="cpu"),
    )
    optimizer = OuterOptimizer()
    state = OuterVariable(problem.init_outer(torch.Generator()), optimizer).state()
    table = Table(title="ray: MAML, Conv4-64, 4 tasks per outer step, 1 thread per worker")
    for column in ("executor", "seconds per step", "tasks / s", "not computing", "speed / local"):
        table.add_column(column)
    local = None
    for name, executor in (
        ("local", LocalExecutor()),
        ("ray, 1 worker", RayExecutor(Workers(num_workers=1))),
        ("ray, 2 workers", RayExecutor(Workers(num_workers=2))),
    ):
        executor.start(workload, optimizer, state)
        reports = list(executor.run(2 + 2 * repeats))[2:]  # the first are for warming up
        executor.close()
        seconds = statistics.median(report.seconds for report in reports)
        total = sum(report.seconds * report.num_workers for report in reports)
        waiting = sum(report.waiting_s for report in reports)
        speed = workload.meta_batch_size / seconds
        local = local or speed
        table.add_row(
            name, f"{seconds:.2f}", f"{speed:.1f}", f"{waiting / total:.1%}", f"{speed / local:.2f}"
        )
    return table


def bench_sampling(repeats: int) -> Table:
    """Sampling against the meta-step that uses the tasks."""
    step = _median(maml.by_metadist(maml.Setting("anil32", 8)), repeats) / 8
    table = Table(title="sampling: against one task of ANIL, Conv4-32, 5 inner steps")
    for column in ("sampler", "tasks / s", "share of a task's time"):
        table.add_column(column)
    samplers: list[tuple[str, TaskSampler]] = [
        ("Glyphs 5-way 1-shot, augmented", Glyphs()),
        ("Glyphs 20-way 1-shot, augmented", Glyphs(n_way=20, k_query=5)),
        ("Glyphs 5-way 1-shot, plain", Glyphs(augment=False)),
        ("Sinusoid 10-shot", Sinusoid()),
    ]
    for name, sampler in samplers:
        each = _median(partial(_draw, sampler, 50), repeats) / 50
        table.add_row(name, f"{1 / each:,.0f}", f"{each / (each + step):.1%}")
    return table


def _median(job: Job, repeats: int) -> float:
    job()
    return statistics.median(seconds_in_turns({"": job}, repeats)[0][""])


def _draw(sampler: TaskSampler, num_tasks: int) -> None:
    for index in range(num_tasks):
        sampler.sample(index)


CONTESTS: dict[str, Callable[[], Contest]] = {
    **maml.CONTESTS,
    **cleaning.CONTESTS,
    **overhead.CONTESTS,
}
OTHERS: dict[str, Callable[[int], Table]] = {"ray": bench_ray, "sampling": bench_sampling}


def machine() -> str:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    peers = ("torchopt", "jax", "betty-ml", "boat-torch", "higher", "learn2learn")
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for peer in peers:
        try:
            versions.append(f"{peer} {metadata.version(peer)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{peer} not installed")
    return f"{cpu}; {', '.join(versions)}"


def main() -> None:
    """Run the selected benchmarks."""
    names = [*CONTESTS, *OTHERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=names, nargs="+", default=names, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of torch")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.list:
        print("\n".join(names))
        return
    if options.memory_of:
        name, way = options.memory_of
        print_peak_memory(CONTESTS[name]().ways[way]())
        return
    console.print(machine())
    for name in options.only:
        began = time.perf_counter()
        if name in CONTESTS:
            table = run_contest(name, CONTESTS[name](), options.repeats, options.threads)
        else:
            table = OTHERS[name](options.repeats)
        console.print(table)
        console.print(f"({time.perf_counter() - began:.0f} s)")


if __name__ == "__main__":
    main()

"""Speed and memory, as ratios against a named alternative within one run.

    scripts/bench                  everything, about ten minutes on two quiet cores
    scripts/bench --only maml      one of: maml anil ray sampling
    scripts/bench --repeats 9      more repetitions; the alternatives take turns

Times are medians of repetitions that take turns, in CPU seconds where one process computes, so
that load on the machine hardly changes the ratios; peak memory is measured in a process of its own,
above what it used before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from metadist import (
    LocalExecutor,
    OuterOptimizer,
    Task,
    TaskSampler,
    task_hypergradients,
)
from metadist.algorithms import ITD
from metadist.cluster import Workers
from metadist.compute import Compute
from metadist.models import Conv4
from metadist.outer import OuterVariable
from metadist.tasks import FewShotProblem, Glyphs, Sinusoid
from metadist.workload import Workload

ENGINES: dict[str, dict[str, Any]] = {
    "higher": {"engine": "higher"},
    "unrolled": {"engine": "unrolled"},
    "adjoint": {"engine": "adjoint"},
    "adjoint, compiled": {"engine": "adjoint", "compile": True},
}
console = Console(soft_wrap=True)


@cache  # what is compiled for a problem is compiled once
def problem_and_tasks(adapt: str, num_tasks: int, width: int) -> tuple[FewShotProblem, list[Task]]:
    """Conv4 on Glyphs, 5-way 5-shot with 15 query examples a class."""
    torch.manual_seed(0)
    sampler = Glyphs(n_way=5, k_shot=5, k_query=15)
    problem = FewShotProblem(Conv4(width=width), adapt=adapt)
    return problem, [sampler.sample(i) for i in range(num_tasks)]


def seconds_in_turns(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of each job, after one warm-up run of each."""
    for job in jobs.values():
        job()
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            began = time.process_time()
            job()
            taken[name].append(time.process_time() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def meta_batch(
    adapt: str, engine: str, inner_steps: int, num_tasks: int, width: int
) -> Callable[[], object]:
    """One evaluation of the hypergradient of a meta-batch."""
    problem, tasks = problem_and_tasks(adapt, num_tasks, width)
    outer = problem.init_outer(torch.Generator())
    algorithm = ITD(inner_steps=inner_steps, inner_lr=0.1, **ENGINES[engine])
    return lambda: task_hypergradients(problem, algorithm, outer, tasks)


def peak_memory_mb(
    adapt: str, engine: str, inner_steps: int, num_tasks: int, width: int, threads: int
) -> float:
    """Peak memory of a meta-batch, measured in a process of its own."""
    setting = json.dumps([adapt, engine, inner_steps, num_tasks, width, threads])
    run = subprocess.run(
        [sys.executable, __file__, "--memory-of", setting],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)


def print_peak_memory(setting: str) -> None:
    """Print the megabytes above those before the meta-batch; `peak_memory_mb` runs this."""
    adapt, engine, inner_steps, num_tasks, width, threads = json.loads(setting)
    torch.set_num_threads(threads)
    # One step on a tiny model pays for what torch loads late.
    meta_batch(adapt, engine, 1, 1, 4)()
    job = meta_batch(adapt, engine, inner_steps, num_tasks, width)
    if "compiled" in engine:
        job()  # the compiler's own memory is not what is asked
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = memory_kb("VmRSS")
    job()
    print((memory_kb("VmHWM") - before) / 1024)


def memory_kb(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def bench_maml(repeats: int, threads: int) -> None:
    """MAML, engines against `higher`."""
    table = Table(title=f"MAML, Conv4-64, 2 tasks, 5-way 5-shot, 15 query; {threads} thread(s)")
    for column in (
        "inner steps",
        "engine",
        "seconds",
        "time / higher",
        "peak MB",
        "memory / higher",
    ):
        table.add_column(column)
    for inner_steps in (5, 20):
        jobs = {name: meta_batch("all", name, inner_steps, 2, 64) for name in ENGINES}
        seconds = seconds_in_turns(jobs, repeats)
        memory = {n: peak_memory_mb("all", n, inner_steps, 2, 64, threads) for n in ENGINES}
        for name in ENGINES:
            table.add_row(
                str(inner_steps), name, f"{seconds[name]:.2f}",
                f"{seconds[name] / seconds['higher']:.2f}", f"{memory[name]:.0f}",
                f"{memory[name] / memory['higher']:.2f}",
            )  # fmt: skip
    console.print(table)


def bench_anil(repeats: int, threads: int) -> None:
    """ANIL, engines against one forward and backward pass of the backbone."""
    table = Table(title=f"ANIL, Conv4-64, 8 tasks, 5-way 5-shot, 15 query; {threads} thread(s)")
    for column in ("inner steps", "what", "seconds", "time / floor", "time / higher"):
        table.add_column(column)
    names = [name for name in ENGINES if "compiled" not in name]
    for inner_steps in (5, 20):
        jobs = {name: meta_batch("head", name, inner_steps, 8, 64) for name in names}
        jobs["floor"] = backbone_pass(8, 64)
        seconds = seconds_in_turns(jobs, repeats)
        for name in ("floor", *names):
            what = "floor: backbone once" if name == "floor" else name
            table.add_row(
                str(inner_steps), what, f"{seconds[name]:.3f}",
                f"{seconds[name] / seconds['floor']:.2f}",
                f"{seconds[name] / seconds['higher']:.2f}",
            )  # fmt: skip
    console.print(table)


def backbone_pass(num_tasks: int, width: int) -> Callable[[], object]:
    """One plain forward and backward of the backbone over the images of each task."""
    _, tasks = problem_and_tasks("head", num_tasks, width)
    torch.manual_seed(0)
    backbone = Conv4(width=width).features
    images = [torch.cat([task.support.tensors[0], task.query.tensors[0]]) for task in tasks]

    def run() -> None:
        for batch in images:
            features = backbone(batch)
            features.backward(torch.ones_like(features))

    return run


def bench_ray(repeats: int, threads: int) -> None:
    """The same outer steps in this process and on Ray."""
    from metadist.cluster import RayExecutor

    problem, _ = problem_and_tasks("all", 1, 64)
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
    table = Table(title="MAML, Conv4-64, 4 tasks per outer step, 1 thread per worker")
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
    console.print(table)


def bench_sampling(repeats: int, threads: int) -> None:
    """Sampling against the meta-step that uses the tasks."""
    anil = meta_batch("head", "adjoint", 5, 8, 32)
    step = seconds_in_turns({"step": anil}, repeats)["step"] / 8
    table = Table(title="Sampling against one task of ANIL, Conv4-32, 5 inner steps")
    for column in ("sampler", "tasks / s", "share of a task's time"):
        table.add_column(column)
    for name, sampler in (
        ("Glyphs 5-way 1-shot, augmented", Glyphs()),
        ("Glyphs 20-way 1-shot, augmented", Glyphs(n_way=20, k_query=5)),
        ("Glyphs 5-way 1-shot, plain", Glyphs(augment=False)),
        ("Sinusoid 10-shot", Sinusoid()),
    ):
        job = partial(draw, sampler, 50)
        each = seconds_in_turns({name: job}, repeats)[name] / 50
        table.add_row(name, f"{1 / each:,.0f}", f"{each / (each + step):.1%}")
    console.print(table)


def draw(sampler: TaskSampler, num_tasks: int) -> list[Task]:
    """The first tasks of a sampler."""
    return [sampler.sample(index) for index in range(num_tasks)]


BENCHES = {"maml": bench_maml, "anil": bench_anil, "ray": bench_ray, "sampling": bench_sampling}


def main() -> None:
    """Run the selected benchmarks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=list(BENCHES), nargs="+", default=list(BENCHES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads of torch")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print_peak_memory(options.memory_of)
        return
    torch.set_num_threads(options.threads)
    for name in options.only:
        BENCHES[name](options.repeats, options.threads)


if __name__ == "__main__":
    main()

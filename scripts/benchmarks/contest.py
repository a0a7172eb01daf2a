"""A contest: several ways to one result, held equal, timed in turns, memory in fresh processes."""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import Tensor

Job = Callable[[], Tensor | None]
"""One way to the result; returns it flat, or None where there is nothing to compare."""

OURS = "metadist"
"""How the names of our ways begin."""

MEMORY_ENVIRONMENT = {
    # Freed blocks go back to the system at once, or memory that one call freed hides what the next
    # one needs.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True)
class Contest:
    """Ways to compute one thing.

    Args:
        title: What is computed.
        baseline: The name of the way by which the others are divided.
        ways: What makes each way ready, by name; it may raise ImportError for a package that is
            not installed.
        tolerance: The largest relative distance of a result from that of the baseline.
        with_memory: Measure the memory of each, too.
    """

    title: str
    baseline: str
    ways: dict[str, Callable[[], Job]]
    tolerance: float = 1e-3
    with_memory: bool = False


def run_contest(name: str, contest: Contest, repeats: int, threads: int) -> Table:
    """The table of a contest.

    A library that finds another result than the baseline gets its row and a mark.

    Raises:
        SystemExit: A result of ours differs from that of the baseline: then times mean nothing.
    """
    jobs: dict[str, Job] = {}
    missing: dict[str, str] = {}
    for way, prepare in contest.ways.items():
        try:
            jobs[way] = prepare()
        except ImportError as failure:
            missing[way] = f"not installed ({failure.name})"
    first: dict[str, float] = {}
    results: dict[str, Tensor | None] = {}
    for way, job in jobs.items():
        began = time.perf_counter()
        results[way] = job()
        first[way] = time.perf_counter() - began
    errors = {way: _distance(result, results[contest.baseline]) for way, result in results.items()}
    for way, error in errors.items():
        if way.startswith(OURS) and error is not None and not error <= contest.tolerance:
            raise SystemExit(
                f"{contest.title}: {way} differs from {contest.baseline} by {error:.1e}, more than "
                f"{contest.tolerance:.0e}; times of different results cannot be compared"
            )
    cpu, wall = seconds_in_turns(jobs, repeats)
    table = Table(title=f"{name}: {contest.title}; {threads} thread(s), {repeats} turns")
    columns = ["way", "CPU ms", "from - to", f"/ {contest.baseline}", "wall ms", "first call s"]
    columns += ["differs by"] + ["peak MB"] * contest.with_memory
    for column in columns:
        table.add_column(column, overflow="fold")
    base = statistics.median(cpu[contest.baseline])
    for way in contest.ways:
        if way in missing:
            table.add_row(way, missing[way])
            continue
        middle, error = statistics.median(cpu[way]), errors[way]
        row = [
            way,
            _milliseconds(middle),
            f"{_milliseconds(min(cpu[way]))} - {_milliseconds(max(cpu[way]))}",
            f"{middle / base:.2f}",
            _milliseconds(statistics.median(wall[way])),
            f"{first[way]:.1f}",
            "" if error is None else f"{error:.0e}" + "!" * (error > contest.tolerance),
        ]
        if contest.with_memory:
            row.append(f"{peak_memory_mb(name, way, threads):.0f}")
        table.add_row(*row)
    return table


def seconds_in_turns(
    jobs: dict[str, Job], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """CPU and wall seconds of each job at each turn; the jobs take turns."""
    cpu: dict[str, list[float]] = {way: [] for way in jobs}
    wall: dict[str, list[float]] = {way: [] for way in jobs}
    for _ in range(repeats):
        for way, job in jobs.items():
            cpu_began, wall_began = _cpu_seconds(), time.perf_counter()
            job()
            cpu[way].append(_cpu_seconds() - cpu_began)
            wall[way].append(time.perf_counter() - wall_began)
    return cpu, wall


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def peak_memory_mb(name: str, way: str, threads: int) -> float:
    """The peak of the second call of a way, above what the first left, in a process of its own.

    The first call pays for what is loaded, compiled and cached once.
    """
    bench = Path(__file__).with_name("bench.py")
    run = subprocess.run(
        [sys.executable, str(bench), "--threads", str(threads), "--memory_of", name, way],
        env={**os.environ, **MEMORY_ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(run.stdout)


def print_peak_memory(job: Job) -> None:
    """Print the megabytes of a second call; `peak_memory_mb` runs this. Linux only."""
    job()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _memory_kb("VmRSS")
    job()
    print((_memory_kb("VmHWM") - before) / 1024)


def _memory_kb(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have {field}")


def _distance(result: Tensor | None, baseline: Tensor | None) -> float | None:
    if result is None or baseline is None:
        return None
    return float((result.double() - baseline.double()).norm() / baseline.double().norm())


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"

"""What sampling ahead gains on Ray: a training with it and without it, in turns.

    .venv/bin/python scripts/benchmarks/ahead.py --waits_ms 40     a disk or a network is slow
    .venv/bin/python scripts/benchmarks/ahead.py --megabytes 8     so much is unpacked for a task

Without it, the sampler borrows torch's global generator, for which nothing is sampled ahead.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from dataclasses import dataclass

import torch

from metadist.algorithms import ITD
from metadist.cluster import RayExecutor, Workers
from metadist.compute import Compute
from metadist.models import MLP
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterVariable
from metadist.task import Task
from metadist.tasks import FewShotProblem, Sinusoid
from metadist.trees import flatten
from metadist.workload import Workload


@dataclass(frozen=True)
class SlowSinusoid(Sinusoid):
    """Sine waves whose data are long in coming."""

    wait_s: float = 0.0
    packed: bytes = b""
    borrows: bool = False

    def sample(self, index: int) -> Task:
        time.sleep(self.wait_s)
        if self.packed:
            zlib.decompress(self.packed)
        if self.borrows:
            torch.get_rng_state()
        return super().sample(index)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--waits_ms", type=float, default=0.0)
    parser.add_argument("--megabytes", type=int, default=0)
    parser.add_argument("--inner_steps", type=int, default=40)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--num_steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    problem = FewShotProblem(MLP(1, 1, (40, 40)), adapt="all", loss="mse")
    packed = b""
    if options.megabytes:
        noise = torch.randint(16, (options.megabytes << 20,), dtype=torch.uint8)
        packed = zlib.compress(noise.numpy().tobytes(), 1)
    optimizer = OuterOptimizer("sgd", lr=1e-3)
    state = OuterVariable(problem.init_outer(torch.Generator()), optimizer).state()
    executor = RayExecutor(Workers(num_workers=options.num_workers))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    ends: list[torch.Tensor] = []
    for _ in range(options.repeats):
        for borrows in (True, False):
            sampler = SlowSinusoid(wait_s=options.waits_ms / 1000, packed=packed, borrows=borrows)
            workload = Workload(
                *(problem, sampler, ITD(options.inner_steps, inner_lr=0.01)),
                meta_batch_size=options.num_workers,
                compute=Compute(device="cpu"),
            )
            executor.start(workload, optimizer, state)
            list(executor.run(3))
            began = time.perf_counter()
            reports = list(executor.run(3 + options.num_steps))
            seconds[not borrows].append(time.perf_counter() - began)
            results = [result for report in reports for result in report.results]
            waited, computed = (
                1000 * statistics.median(values)
                for values in zip(*((r.sampling_s, r.compute_s) for r in results), strict=True)
            )
            way = "the lease before" if not borrows else "its own lease"
            print(
                f"sampled during {way}: {seconds[not borrows][-1]:.2f} s; a lease waits "
                f"{waited:.1f} ms for its tasks and computes {computed:.1f} ms"
            )
            ends.append(flatten(executor.state().outer))
    executor.close()
    assert all(torch.equal(end, ends[0]) for end in ends)
    ratio = statistics.median(seconds[False]) / statistics.median(seconds[True])
    print(f"the same bytes, {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()

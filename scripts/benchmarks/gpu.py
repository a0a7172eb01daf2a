"""What docs/gpu.md asks of a GPU, section by section; each is caught on its own.

    scripts/gpu                            everything, in at most 13 minutes
    scripts/gpu --only speed scaling       some sections
    scripts/gpu --device cpu --tiny        no GPU: the same code, small

Needs what the tests need, `higher` for its row, and Ray for the last section. No setting of the
card is changed. Sections that would begin after `--seconds` are left out, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import maml
import torch
from contest import Job
from torch import Tensor

from metadist import LocalExecutor, Trainer, evaluate, task_hypergradients
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, BOME, ITD
from metadist.compute import Compute, pick_device
from metadist.executor import Executor, StepReport
from metadist.models import Conv4
from metadist.optimizer import OuterOptimizer
from metadist.outer import Contribution, LeaseResult, OuterVariable
from metadist.task import Task, to_device
from metadist.tasks import FewShotProblem, Glyphs
from metadist.trees import flatten

Rows = Iterator[tuple[object, ...]]


class Card:
    """The device, and how large what runs on it is."""

    def __init__(self, device: str, is_tiny: bool) -> None:
        self.device = pick_device(device)
        self.is_tiny = is_tiny
        self.is_gpu = self.device.type == "cuda"
        self.width = 4 if is_tiny else 64

    def wait(self) -> None:
        """Until the device has done all that it was asked."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, job: Callable[[], object]) -> float:
        """The median of some calls, the device idle before and after."""
        repeats, warm_up = (1, 0) if self.is_tiny else (7, 2)
        for _ in range(warm_up):
            job()
        taken = []
        for _ in range(repeats):
            self.wait()
            began = time.perf_counter()
            job()
            self.wait()
            taken.append(time.perf_counter() - began)
        return 1000 * statistics.median(taken)

    def megabytes(self, job: Callable[[], object]) -> float | str:
        """The peak of a call above what there was."""
        if not self.is_gpu:
            return "not run"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        self.wait()
        return float(torch.cuda.max_memory_allocated() - before) / 2**20

    def waits(self, job: Callable[[], object]) -> int | str:
        """How often a call waits for the device, as far as torch notices."""
        if not self.is_gpu:
            return "not run"
        job()
        self.wait()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                job()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in found)

    def lease(
        self, adapt: Literal["all", "head"], num_tasks: int, steps: int, **options: Any
    ) -> Job:
        """The hypergradient of that many 5-way 5-shot tasks."""
        torch.manual_seed(0)
        problem = FewShotProblem(Conv4(width=self.width), adapt=adapt)
        variables = problem.init_outer(torch.Generator())
        outer = {name: leaf.to(self.device) for name, leaf in variables.items()}
        tasks = [to_device(task, self.device) for task in drawn(num_tasks)]
        engine = options.pop("engine", "adjoint")
        algorithm = options.pop("algorithm", None)
        algorithm = algorithm or ITD(inner_steps=steps, inner_lr=0.1, engine=engine)
        options = {"cuda_graphs": False, **options}

        def job() -> Tensor:
            found = task_hypergradients(
                *(problem, algorithm, outer, tasks), compute=Compute(**options), is_checked=True
            )
            return torch.cat([leaf.flatten() for leaf in found.total.values()])

        return job


def drawn(num_tasks: int) -> list[Task]:
    """Tasks of Glyphs, 5-way 5-shot."""
    sampler = Glyphs(n_way=5, k_shot=5, k_query=15)
    return [sampler.sample(index) for index in range(num_tasks)]


def ceilings(card: Card) -> Rows:
    """What the card can do at best."""
    yield "what", "figure"
    size = 128 if card.is_tiny else 8192
    first, second = (torch.randn(size, size, device=card.device) for _ in range(2))
    for precision in ("highest", "tf32"):
        with Compute(precision=precision).applied():
            spent = card.milliseconds(lambda: first @ second)
        yield f"products of float32, {precision}, TFLOP/s", 2 * size**3 / spent / 1e9
    one = torch.ones(1, device=card.device)

    def calls() -> None:
        for _ in range(1000):
            one.add(1)

    yield "a small call, microseconds", card.milliseconds(calls)
    yield "a look at a number, microseconds", 1000 * card.milliseconds(lambda: float(one))


def correctness(card: Card) -> Rows:
    """`pytest -m gpu`: against float64 of the CPU, the same bytes again and in another process."""
    yield "tests", "result"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "tests/gpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in run.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            yield line.partition(" ")[2], line.partition(" ")[0]
    yield "in all", run.stdout.strip().rpartition("\n")[2]


def digests(card: Card) -> dict[str, str]:
    """SHA-256 of float32 hypergradients, at sizes that people use."""
    steps = 2 if card.is_tiny else 5
    cases: dict[str, tuple[Literal["all", "head"], Algorithm]] = {
        "MAML": ("all", ITD(inner_steps=steps, inner_lr=0.1)),
        "ANIL": ("head", ITD(inner_steps=steps, inner_lr=0.1)),
        "ANIL, AID": ("head", AID(inner_steps=steps, inner_lr=0.1, damping=0.1)),
        "ANIL, BOME": ("head", BOME(inner_steps=steps, inner_lr=0.1)),
    }
    found = {}
    for name, (adapt, algorithm) in cases.items():
        for vectorize in (False, True):
            job = card.lease(adapt, 4, steps, algorithm=algorithm, vectorize=vectorize)
            flat = job()
            assert flat is not None
            digest = hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()
            found[f"{name}, {'vmap' if vectorize else 'loop'}"] = digest
    return found


def repeat(card: Card) -> Rows:
    """Are the bytes the same again, at other addresses, in another process?"""
    yield "lease", "again", "other addresses", "other process"
    first, again = digests(card), digests(card)
    ballast = torch.empty(12_345_677, device=card.device)
    moved = digests(card)
    del ballast
    command = [sys.executable, __file__, "--digests", "--device", str(card.device)]
    command += ["--tiny"] if card.is_tiny else []
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    elsewhere = json.loads(run.stdout.splitlines()[-1])
    for name, digest in first.items():
        same = ["same" if d[name] == digest else "OTHER" for d in (again, moved, elsewhere)]
        yield name, *same


LEASES: tuple[tuple[str, Literal["all", "head"], int, int], ...] = (
    ("MAML 4 x 5", "all", 4, 5),
    ("ANIL 8 x 10", "head", 8, 10),
)


def speed(card: Card) -> Rows:
    """Leases by engine, in a loop and under vmap, beside the library `higher`."""
    yield "lease", "way", "ms", "waits", "peak MB"
    for name, adapt, num_tasks, steps in LEASES:
        if card.is_tiny:
            num_tasks, steps = 2, 2
        ways: dict[str, Job] = {}
        for engine in ("adjoint", "unrolled"):
            for vectorize in (False, True):
                way = f"{engine}, {'vmap' if vectorize else 'loop'}"
                options = {"engine": engine, "vectorize": vectorize}
                ways[way] = card.lease(adapt, num_tasks, steps, **options)
        ways["engine higher"] = card.lease(
            adapt, num_tasks, steps, engine="higher", vectorize=False
        )
        if adapt == "all":
            ways["higher"] = by_higher(card, num_tasks, steps)
        for way, job in ways.items():
            yield name, way, card.milliseconds(job), card.waits(job), card.megabytes(job)


def by_higher(card: Card, num_tasks: int, steps: int) -> Job:
    """MAML by the library alone."""
    setting = maml.Setting("conv64", num_tasks, steps)
    if card.is_tiny:
        setting.plain = maml.plain_conv4(Conv4(width=card.width), card.width)
    setting.plain.to(card.device)
    setting.data = [tuple(tensor.to(card.device) for tensor in columns) for columns in setting.data]
    return maml.by_higher(setting)


def graphs(card: Card) -> Rows:
    """A lease asked for call by call, and as one CUDA graph."""
    yield "lease", "way", "ms", "ms as a graph", "bytes", "peak MB as a graph"
    as_graph: Literal["auto"] | bool = True if card.is_gpu else "auto"
    for name, adapt, num_tasks, steps in LEASES:
        if card.is_tiny:
            num_tasks, steps = 2, 2
        for vectorize in (False, True):
            way = "vmap" if vectorize else "loop"
            plain = card.lease(adapt, num_tasks, steps, vectorize=vectorize, cuda_graphs=False)
            graph = card.lease(adapt, num_tasks, steps, vectorize=vectorize, cuda_graphs=as_graph)
            expected, _, _, found = plain(), graph(), graph(), graph()  # compared, trusted
            assert expected is not None and found is not None
            same = "same" if torch.equal(expected, found) else "OTHER"
            times = card.milliseconds(plain), card.milliseconds(graph)
            yield name, way, *times, same, card.megabytes(graph)


def precision(card: Card) -> Rows:
    """What tf32, and bfloat16 before a head, gain and cost."""
    yield "lease", "precision", "ms", "distance to highest"
    for name, adapt, num_tasks, steps in LEASES:
        if card.is_tiny:
            num_tasks, steps = 2, 2
        exact = None
        for rounding in ("highest", "tf32", "bf16"):
            if rounding == "bf16" and adapt == "all":
                continue
            field = "encode_precision" if rounding == "bf16" else "precision"
            job = card.lease(adapt, num_tasks, steps, vectorize=False, **{field: rounding})
            found = job()
            assert found is not None
            exact = found if exact is None else exact
            error = float((found - exact).norm() / exact.norm())
            yield name, rounding, card.milliseconds(job), error


def scaling(card: Card) -> Rows:
    """Time by task with more tasks in a lease."""
    yield "lease", "tasks", "vmap", "ms by task", "peak MB"
    for name, adapt, _, steps in LEASES:
        for num_tasks in (1, 2) if card.is_tiny else (1, 4, 16, 64):
            for vectorize in (False, True):
                if vectorize and num_tasks == 1:
                    continue
                job = card.lease(
                    adapt, num_tasks, 2 if card.is_tiny else steps, vectorize=vectorize
                )
                spent = card.milliseconds(job) / num_tasks
                yield name, num_tasks, vectorize, spent, card.megabytes(job)


def plane(card: Card) -> Rows:
    """What moves between host and card, and a step of x there."""
    yield "what", "ms"
    size = 10_000 if card.is_tiny else 12_500_000
    flat = torch.zeros(size, device=card.device)
    yield f"{size:,} numbers to the host", card.milliseconds(lambda: flat.cpu())
    task = drawn(1)[0]
    yield (
        "a 5-way 5-shot task to the device",
        card.milliseconds(lambda: to_device(task, card.device)),
    )
    yield "drawing it", card.milliseconds(lambda: drawn(1))
    variable = OuterVariable({"x": flat}, OuterOptimizer("adam", lr=1e-3))

    def step() -> None:
        result = LeaseResult(lease_id=variable.version, version=variable.version, num_tasks=1)
        variable.apply([Contribution(result=result, total=torch.ones_like(flat))])

    yield "a step of x there, Adam", card.milliseconds(step)


class Ended(NamedTuple):
    """How a training of Glyphs ended: x, the milliseconds of a step, the accuracy, where it ran."""

    x: Tensor
    by_step: float
    accuracy: str
    place: str

    def beside(self, other: Tensor) -> str:
        """How far x is from another."""
        if torch.equal(self.x, other):
            return "same bytes"
        return f"{float((self.x - other).norm() / other.norm()):.1e} from the first"


def train(card: Card, adapt: Literal["all", "head"], device: str, executor: Executor) -> Ended:
    """Some steps of 8 tasks; the first, in which all is prepared, is not timed."""
    torch.manual_seed(0)
    problem = FewShotProblem(Conv4(width=card.width), adapt=adapt)
    sampler = Glyphs(n_way=5, k_shot=1, k_query=15)
    compute = Compute(device=device)
    trainer = Trainer(
        *(problem, sampler, ITD(inner_steps=5, inner_lr=0.4 if adapt == "head" else 0.1)),
        outer_optimizer=OuterOptimizer("adam", lr=1e-3),
        meta_batch_size=8,
        tasks_per_lease=4,  # the default differs by device and executor, and so do roundings
        compute=compute,
        executor=executor,
        quiet=True,
    )
    num_steps = 2 if card.is_tiny else 30
    times: list[float] = []
    places: set[str] = set()

    def note(report: StepReport) -> bool:
        times.append(report.seconds)
        places.add(executor.describe().get("device", ""))  # known until the end of the run
        return True

    trainer.fit(1 + num_steps, on_step=note)
    judged = evaluate(
        *(problem, sampler, trainer.algorithm, trainer.outer),
        4 if card.is_tiny else 100,
        compute=compute,
        before=False,
    )
    return Ended(
        x=flatten(trainer.outer),
        by_step=1000 * statistics.median(times[1:]),
        accuracy=str(judged.metrics["query_accuracy"]),
        place=", ".join(sorted(places)),
    )


def trainer(card: Card) -> Rows:
    """Trainings of 8 tasks a step: twice, and beside the CPU."""
    yield "adapts", "device", "ms by step", "x", "accuracy"
    for adapt in ("head", "all"):
        first = None
        for device in (*(2 * [str(card.device)] if card.is_gpu else ()), "cpu"):
            if device == "cpu" and adapt == "all" and card.is_gpu:
                continue  # takes minutes
            ended = train(card, adapt, device, LocalExecutor())
            first = ended.x if first is None else first
            yield adapt, device, ended.by_step, ended.beside(first), ended.accuracy


def ray(card: Card) -> Rows:
    """Ray workers that share the card, with x on the CPU or there, beside one process."""
    yield "executor", "ms by step", "x", "devices"
    if importlib.util.find_spec("ray") is None:
        yield "not run, since Ray is not installed", "", "", ""
        return
    from metadist.cluster import RayExecutor, Server, Workers

    def shared(num_workers: int, by_worker: float, by_server: float = 0.0) -> RayExecutor:
        if not card.is_gpu:
            return RayExecutor(Workers(num_workers))
        workers = Workers(num_workers, gpus_per_worker=by_worker)
        return RayExecutor(workers, Server(gpus_per_server=by_server))

    executors: dict[str, Callable[[], Executor]] = {
        "one process": LocalExecutor,
        "1 worker": lambda: shared(1, 1.0),
        "2 workers, half of it each": lambda: shared(2, 0.5),
        "2 workers, x on the card": lambda: shared(2, 0.4, 0.2),
    }
    if not card.is_gpu:
        del executors["2 workers, x on the card"], executors["1 worker"]
    first = None
    for name, make in executors.items():
        executor = make()
        try:
            ended = train(card, "head", card.device.type, executor)
        finally:
            executor.close()
        first = ended.x if first is None else first
        yield name, ended.by_step, ended.beside(first), ended.place


SECTIONS: dict[str, Callable[[Card], Rows]] = {
    "ceilings": ceilings,
    "correctness": correctness,
    "repeat": repeat,
    "speed": speed,
    "graphs": graphs,
    "precision": precision,
    "scaling": scaling,
    "plane": plane,
    "trainer": trainer,
    "ray": ray,
}


def run_section(name: str, card: Card) -> bool:
    """Print a section as a table; False: it did not get to its end."""
    began = time.perf_counter()
    print(f"\n### {name}: {SECTIONS[name].__doc__}\n", flush=True)
    try:
        for number, row in enumerate(SECTIONS[name](card)):
            cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
            print("| " + " | ".join(cells) + " |", flush=True)
            if number == 0:
                print("|" + "---|" * len(row))
    except Exception:  # noqa: BLE001  # the other sections are worth having
        traceback.print_exc()
        return False
    finally:
        print(f"\n({time.perf_counter() - began:.0f} s)", flush=True)
    return True


def main() -> None:
    """Run the selected sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=780, help="no section begins after that")
    parser.add_argument("--digests", action="store_true", help="what `repeat` compares, alone")
    options = parser.parse_args()
    try:
        card = Card(options.device, options.tiny)
    except ValueError as error:
        parser.error(f"{error}; --device cpu --tiny runs the same code")
    if options.digests:
        print(json.dumps(digests(card)))
        return
    began = time.perf_counter()
    name = torch.cuda.get_device_name(card.device) if card.is_gpu else str(card.device)
    print(f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    failed = False
    for section in options.only:
        if time.perf_counter() - began > options.seconds:
            print(
                f"\n### {section}: left out, for {options.seconds:g} seconds are over", flush=True
            )
            failed = True
            continue
        failed |= not run_section(section, card)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""What docs/gpu.md asks of a GPU, section by section.

    scripts/gpu --out gpu.md               everything, in 14 minutes at the most
    scripts/gpu --only speed scaling       some sections
    scripts/gpu --device cpu --tiny        no GPU: the same code, small

Each section is a process of its own, since an error of CUDA spoils the one it is met in, and is
ended when it takes too long. Its rows are printed, and written to `--out`, as they come: what ends
in between leaves all it has found. A row that cannot be had says why.

Needs what the tests need, `higher` for its row, and Ray for the last section. No setting of the
card is changed. Sections that would begin after `--seconds` are left out, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import maml
import torch
import torch.nn.functional as F
from contest import Job
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from metadist import LocalExecutor, Problem, Trainer, evaluate, task_hypergradients
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, BOME, ITD, SOBA
from metadist.compute import Compute, pick_device
from metadist.executor import Executor, StepReport
from metadist.feed import send
from metadist.models import Conv4
from metadist.optimizer import OPTIMIZERS, OuterOptimizer
from metadist.outer import Contribution, LeaseResult, OuterVariable
from metadist.task import Batch, Task, to_device
from metadist.tasks import FewShotProblem, Glyphs, HyperCleaning, TextRegularisation
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

    def kernels(self, job: Callable[[], object]) -> tuple[int | str, float | str]:
        """(what a call asks of the device, kernels and copies, the milliseconds it is busy)."""
        if not self.is_gpu:
            return "not run", "not run"
        job()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            job()
            self.wait()
        spans = [e.time_range for e in found.events() if "cuda" in str(e.device_type).lower()]
        return len(spans), sum(span.end - span.start for span in spans) / 1000

    def measured(self, job: Callable[[], object]) -> tuple[object, ...]:
        """Milliseconds, kernels, milliseconds at work, waits and megabytes; or why not."""

        def all_of_it() -> tuple[object, ...]:
            spent, (kernels, busy) = self.milliseconds(job), self.kernels(job)
            return spent, kernels, busy, self.waits(job), self.megabytes(job)

        return attempt(all_of_it, 5)

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


def attempt(job: Callable[[], tuple[object, ...]], num_cells: int) -> tuple[object, ...]:
    """The cells that `job` gives, or why it gives none."""
    try:
        return job()
    except Exception as error:  # noqa: BLE001  # the other rows are worth having
        traceback.print_exc()
        reason = str(error).strip().partition("\n")[0][:80].replace("|", "/")
        return f"{type(error).__name__}: {reason}", *[""] * (num_cells - 1)


def drawn(num_tasks: int) -> list[Task]:
    """Tasks of Glyphs, 5-way 5-shot."""
    sampler = Glyphs(n_way=5, k_shot=5, k_query=15)
    return [sampler.sample(index) for index in range(num_tasks)]


def ceilings(card: Card) -> Rows:
    """What the card can do at best."""
    yield "what", "figure"
    size = 128 if card.is_tiny else 8192
    for kind, dtype in (("highest", torch.float32), ("tf32", torch.float32), ("bf16", None)):
        first, second = (
            torch.randn(size, size, device=card.device, dtype=dtype or torch.bfloat16)
            for _ in range(2)
        )
        with Compute(precision="tf32" if kind == "tf32" else "highest").applied():
            spent = card.milliseconds(partial(torch.matmul, first, second))
        yield f"products, {kind}, TFLOP/s", 2 * size**3 / spent / 1e9
    num_images = 16 if card.is_tiny else 4096
    images = torch.randn(num_images, 64, 28, 28, device=card.device, requires_grad=True)
    kernel = torch.randn(64, 64, 3, 3, device=card.device, requires_grad=True)
    ones = torch.ones_like(images)

    def convolve() -> None:
        torch.autograd.grad(F.conv2d(images, kernel, padding=1), (images, kernel), ones)

    for precision in ("highest", "tf32"):
        with Compute(precision=precision).applied():
            spent = card.milliseconds(convolve)
        flop = 3 * 2 * num_images * 64 * 64 * 9 * 28 * 28
        yield f"3 x 3 convolutions, both ways, {precision}, TFLOP/s", flop / spent / 1e9
    source, target = (torch.empty(size**2, device=card.device) for _ in range(2))
    spent = card.milliseconds(lambda: target.copy_(source))
    yield "memory, read and written, GB/s", 2 * source.nbytes / spent / 1e6
    one = torch.ones(1, device=card.device)

    def calls() -> None:
        for _ in range(1000):
            one.add(1)

    yield "a small call, microseconds", card.milliseconds(calls)
    yield "a look at a number, microseconds", 1000 * card.milliseconds(lambda: float(one))
    filled = 1000 * card.milliseconds(lambda: one.new_full((), 0.1))
    yield "a number filled in there, microseconds", filled
    sent = 1000 * card.milliseconds(lambda: one.new_tensor(0.1))
    yield "a number sent there, microseconds", sent


def correctness(card: Card) -> Rows:
    """`pytest -m gpu`: against float64 of the CPU, the same bytes again and in another process."""
    yield "tests", "result"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-rfE", "--tb=short", "tests/gpu"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    counts: Counter[str] = Counter()
    rest = ""
    for line in run.stdout:
        found = OUTCOME.match(line)
        if found is not None:
            test, word = found.groups()
            counts[word] += 1
            if word not in ("PASSED", "SKIPPED"):
                yield test.replace("|", "/"), word
        elif counts:
            rest += line
    if counts["FAILED"] or counts["ERROR"]:
        print(rest, file=sys.stderr)
    yield "in all", ", ".join(f"{n} {word.lower()}" for word, n in counts.items()) or "none"
    if run.wait() not in (0, NO_TESTS):
        raise RuntimeError("some tests have failed")


OUTCOME = re.compile(r"(tests/\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)")
"""A line of pytest; the names of some tests have blanks."""

NO_TESTS = 5
"""What pytest returns where it finds none."""


def one_lower_problem(card: Card) -> dict[str, tuple[Problem, Task, dict[str, Any]]]:
    """Problems with one task, its data, and options of its computation."""
    random = torch.Generator().manual_seed(0)
    size, terms = (50, 30) if card.is_tiny else (5000, 20_000)

    def images() -> Batch:
        return Batch.of(torch.randn(size, 784, generator=random), torch.arange(size) % 10)

    def texts() -> Batch:
        columns = torch.randint(terms, (size, 20), generator=random)
        values = torch.rand(size, 20, generator=random)
        return Batch.named(columns=columns, values=values, targets=torch.arange(size) % 5)

    cleaning, words = HyperCleaning(size), TextRegularisation(terms, 5)
    return {
        "cleaning": (cleaning, Task(images(), images(), 0), {}),
        "cleaning, batches": (cleaning, Task(images(), images(), 0), {"batch_size": size // 10}),
        "texts": (words, Task(texts(), texts(), 0), {}),
    }


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
    for name, (problem, task, options) in one_lower_problem(card).items():
        outer = problem.init_outer(torch.Generator().manual_seed(0))
        there = {n: leaf.to(card.device) for n, leaf in outer.items()}
        states: dict[int, Tensor] = {}
        for step in range(3):
            lease = task_hypergradients(
                *(
                    problem,
                    SOBA(inner_lr=0.1, adjoint_lr=0.1),
                    there,
                    [to_device(task, card.device)],
                ),
                compute=Compute(cuda_graphs=False, **options),
                states=states,
                step=step,
                is_checked=True,
            )
            states = lease.states
        flat = torch.cat([flatten(lease.total), states[0]])
        found[f"{name}, SOBA"] = hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()
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
    """Leases by engine, in a loop and under vmap, beside plain torch and the library `higher`."""
    yield "lease", "way", "ms", "kernels", "ms at work", "waits", "peak MB"
    for name, adapt, num_tasks, steps in LEASES:
        if card.is_tiny:
            num_tasks, steps = 2, 2
        ways: dict[str, Callable[[], Job]] = {}
        for engine in ("adjoint", "unrolled", "higher"):
            for vectorize in (False, True):
                if engine == "higher" and vectorize:
                    continue
                way = f"{engine}, {'vmap' if vectorize else 'loop'}"
                options = {"engine": engine, "vectorize": vectorize}
                ways[way] = partial(card.lease, adapt, num_tasks, steps, **options)
                if engine == "adjoint" and card.is_gpu:
                    graph = {**options, "cuda_graphs": True}
                    ways[f"{way}, graph"] = partial(card.lease, adapt, num_tasks, steps, **graph)
        if adapt == "all":
            for way, make in PLAIN.items():
                ways[way] = partial(plain, card, make, num_tasks, steps)
        for way, prepare in ways.items():
            yield name, way, *card.measured(Prepared(prepare))


class Prepared:
    """A job that is made when it is called first."""

    def __init__(self, prepare: Callable[[], Job]) -> None:
        self._prepare = prepare
        self._job: Job | None = None

    def __call__(self) -> object:
        self._job = self._prepare() if self._job is None else self._job
        return self._job()


PLAIN: dict[str, Callable[[maml.Setting], Job]] = {
    "plain torch, loop": maml.by_loop,
    "torch.func, vmap": maml.by_vmap,
    "the library higher": maml.by_higher,
}


def plain(card: Card, make: Callable[[maml.Setting], Job], num_tasks: int, steps: int) -> Job:
    """MAML without this library."""
    setting = maml.Setting("conv64", num_tasks, steps)
    if card.is_tiny:
        setting.plain = maml.plain_conv4(Conv4(width=card.width), card.width)
        setting.start = {n: p.detach().clone() for n, p in setting.plain.named_parameters()}
    setting.plain.to(card.device)
    setting.start = {name: leaf.to(card.device) for name, leaf in setting.start.items()}
    setting.data = [tuple(tensor.to(card.device) for tensor in columns) for columns in setting.data]
    return make(setting)


def graphs(card: Card) -> Rows:
    """A lease asked for call by call, and as one CUDA graph."""
    yield "lease", "way", "ms", "ms as a graph", "bytes", "peak MB as a graph"
    as_graph: Literal["auto"] | bool = True if card.is_gpu else "auto"
    for name, adapt, num_tasks, steps in LEASES:
        if card.is_tiny:
            num_tasks, steps = 2, 2
        for vectorize in (False, True):
            compared = partial(beside_graph, card, adapt, num_tasks, steps, vectorize, as_graph)
            yield name, "vmap" if vectorize else "loop", *attempt(compared, 4)


def beside_graph(
    card: Card,
    adapt: Literal["all", "head"],
    num_tasks: int,
    steps: int,
    vectorize: bool,
    as_graph: Literal["auto"] | bool,
) -> tuple[object, ...]:
    """The times without and with a graph, whether the bytes are the same, and its memory."""
    plain = card.lease(adapt, num_tasks, steps, vectorize=vectorize, cuda_graphs=False)
    graph = card.lease(adapt, num_tasks, steps, vectorize=vectorize, cuda_graphs=as_graph)
    expected, _, _, found = plain(), graph(), graph(), graph()  # compared, trusted
    assert expected is not None and found is not None
    same = "same" if torch.equal(expected, found) else "OTHER"
    return card.milliseconds(plain), card.milliseconds(graph), same, card.megabytes(graph)


def precision(card: Card) -> Rows:
    """What tf32, and bfloat16 before a head, gain and cost."""
    yield "lease", "precision", "ms", "distance to highest"
    for name, adapt, num_tasks, steps in LEASES:
        if card.is_tiny:
            num_tasks, steps = 2, 2
        exact = card.lease(adapt, num_tasks, steps, vectorize=False)()
        assert exact is not None
        for rounding in ("highest", "tf32", "bf16"):
            if rounding == "bf16" and adapt == "all":
                continue
            field = "encode_precision" if rounding == "bf16" else "precision"
            job = card.lease(adapt, num_tasks, steps, vectorize=False, **{field: rounding})
            yield name, rounding, *attempt(partial(beside, card, job, exact), 2)


def beside(card: Card, job: Job, exact: Tensor) -> tuple[object, ...]:
    """The time of a job, and how far off its result is."""
    found = job()
    assert found is not None
    return card.milliseconds(job), float((found - exact).norm() / exact.norm())


def scaling(card: Card) -> Rows:
    """Time by task with more tasks in a lease; as graphs too."""
    yield "lease", "tasks", "way", "ms by task", "peak MB"
    for name, adapt, _, steps in LEASES:
        for num_tasks in (1, 2) if card.is_tiny else (1, 4, 16, 64):
            for vectorize, graph in ((False, False), (False, True), (True, False), (True, True)):
                if (vectorize and num_tasks == 1) or (graph and not card.is_gpu):
                    continue
                way = ("vmap" if vectorize else "loop") + (", graph" if graph else "")
                options = {"vectorize": vectorize, "cuda_graphs": graph}
                job = card.lease(adapt, num_tasks, 2 if card.is_tiny else steps, **options)
                yield name, num_tasks, way, *attempt(partial(by_task, card, job, num_tasks), 2)


def by_task(card: Card, job: Job, num_tasks: int) -> tuple[object, ...]:
    """Milliseconds by task, and megabytes."""
    return card.milliseconds(job) / num_tasks, card.megabytes(job)


def plane(card: Card) -> Rows:
    """What moves between host and card, and a step of x there."""
    yield "what", "figure"
    size = 10_000 if card.is_tiny else 12_500_000
    there = torch.zeros(size, device=card.device)
    pageable = torch.zeros(size)
    hosts = {"pageable": pageable}
    if card.is_gpu:
        hosts["pinned"] = pageable.pin_memory()
    for kind, host in hosts.items():
        to_host = card.milliseconds(partial(host.copy_, there, non_blocking=kind == "pinned"))
        to_card = card.milliseconds(partial(there.copy_, host, non_blocking=kind == "pinned"))
        yield f"{size:,} numbers to the host, {kind}, ms", to_host
        yield f"{size:,} numbers to the card, {kind}, ms", to_card
    task = drawn(1)[0]
    sent = card.milliseconds(lambda: to_device(task, card.device))
    yield "a 5-way 5-shot task to the device, tensor by tensor, ms", sent
    packed = card.milliseconds(lambda: send([task], card.device, torch.float32))
    yield "the same in one copy, ms", packed
    yield "drawing it, ms", card.milliseconds(lambda: drawn(1))
    for device in dict.fromkeys((torch.device("cpu"), card.device)):
        yield f"a step of x on {device}, Adam, ms", card.milliseconds(stepping(size, device))
    parameter = torch.nn.Parameter(torch.zeros(size, device=card.device))
    parameter.grad = torch.ones_like(parameter)
    floor = torch.optim.Adam([parameter], fused=True)
    yield "Adam of torch alone, ms", card.milliseconds(floor.step)
    for name in OPTIMIZERS:
        cell = attempt(partial(owned, card, name), 1)
        yield f"x after 5 steps of {name}, its distance to that of the CPU", *cell


def stepping(size: int, device: torch.device) -> Callable[[], None]:
    """A step of Adam on x of that size."""
    optimizer = OuterOptimizer("adam", lr=1e-3, clip_norm=1.0)
    variable = OuterVariable({"x": torch.zeros(size, device=device)}, optimizer)
    total = torch.ones(size, device=device)

    def step() -> None:
        result = LeaseResult(lease_id=variable.version, version=variable.version, num_tasks=1)
        variable.apply([Contribution(result=result, total=total)])

    return step


def owned(card: Card, name: Any) -> tuple[object, ...]:
    """How far x on the device is from that on the CPU."""
    ends = []
    for device in (torch.device("cpu"), card.device):
        optimizer = OuterOptimizer(name, lr=0.01, clip_norm=1.0)
        start = torch.linspace(-1, 1, 2000).to(device)
        variable = OuterVariable({"x": start}, optimizer)
        for step in range(5):
            total = torch.linspace(1, 2, 2000).sin().mul(step + 1).to(device)
            result = LeaseResult(lease_id=step, version=step, num_tasks=1)
            variable.apply([Contribution(result=result, total=total)])
        ends.append(variable.params["x"].cpu())
    return (float((ends[1] - ends[0]).norm() / ends[0].norm()),)


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


SECTIONS: dict[str, tuple[Callable[[Card], Rows], int]] = {
    "ceilings": (ceilings, 60),
    "correctness": (correctness, 300),
    "repeat": (repeat, 120),
    "speed": (speed, 150),
    "graphs": (graphs, 90),
    "scaling": (scaling, 150),
    "precision": (precision, 60),
    "plane": (plane, 60),
    "trainer": (trainer, 90),
    "ray": (ray, 150),
}
"""What it does, and the seconds after which it is ended; in order of worth."""


def run_section(name: str, card: Card) -> None:
    """Print a section as a table."""
    rows, _ = SECTIONS[name]
    for number, row in enumerate(rows(card)):
        cells = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row]
        print("| " + " | ".join(cells) + " |", flush=True)
        if number == 0:
            print("|" + "---|" * len(row), flush=True)


class Report:
    """What is printed, and written to a file as it comes."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("w")

    def say(self, text: str) -> None:
        """Print a line."""
        for file in (sys.stdout, self._file):
            if file is not None:
                print(text, file=file, flush=True)

    def section(self, name: str, arguments: list[str], limit_s: float) -> bool:
        """Run a section in a process of its own; False: it did not get to its end."""
        rows, own_s = SECTIONS[name]
        began, limit_s = time.perf_counter(), min(own_s, limit_s)
        self.say(f"\n### {name}: {rows.__doc__}\n")
        command = [sys.executable, __file__, *arguments, "--section", name]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)

        def end() -> None:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with what it has started

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                self.say(line.rstrip("\n"))
            code = child.wait()
        finally:
            timer.cancel()
        seconds = time.perf_counter() - began
        ended = "" if code == 0 else f", ended after {limit_s:.0f}" if seconds >= limit_s else ""
        failed = f", exit code {code}" if code and not ended else ""
        self.say(f"\n({seconds:.0f} s{ended}{failed})")
        return code == 0


def main() -> None:
    """Run the selected sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=840, help="everything ends by then")
    parser.add_argument("--out", type=Path, help="a file for all that is printed")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--digests", action="store_true", help="what `repeat` compares, alone")
    options = parser.parse_args()
    try:
        card = Card(options.device, options.tiny)
    except ValueError as error:
        parser.error(f"{error}; --device cpu --tiny runs the same code")
    if options.digests:
        print(json.dumps(digests(card)))
        return
    if options.section:
        run_section(options.section, card)
        return
    began = time.perf_counter()
    report = Report(options.out)
    name = torch.cuda.get_device_name(card.device) if card.is_gpu else str(card.device)
    report.say(f"{name}; torch {torch.__version__}, CUDA {torch.version.cuda}")
    arguments = ["--device", options.device, *(["--tiny"] if card.is_tiny else [])]
    failed = False
    for section in options.only:
        left = options.seconds - (time.perf_counter() - began)
        if left < LEAST_S:
            report.say(f"\n### {section}: left out, for {options.seconds:g} seconds are over")
            failed = True
            continue
        failed |= not report.section(section, arguments, left)
    sys.exit(failed)


LEAST_S = 10
"""A section that has less is left out."""


if __name__ == "__main__":
    main()

"""`Feed`: tasks on a device have the bytes of `sample`, are waited for once, and come in time."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metadist import LocalExecutor, OuterOptimizer
from metadist.algorithms import ITD
from metadist.checks.sampler import SamplerError, check_sampler
from metadist.compute import Compute
from metadist.feed import Feed, Packed, Wanted
from metadist.outer import OuterVariable
from metadist.sampler import Resident, sample_task
from metadist.task import Batch, Task, tensors_of, to_device
from metadist.tasks import CorruptedImages, FewShotDataset, FewShotProblem, Glyphs, ImageFolder
from metadist.tasks.few_shot.episodes import ClassImages, EpisodeSampler
from metadist.workload import Workload
from tests.helpers import Images, raw, small_conv4
from tests.pretend_device import DEVICE, Elsewhere, pretending
from tests.problems import Quadratic, QuadraticSampler, generator

BUDGET = 10**9


def halved(images):
    return images / 2


def shifted(images):
    return images.sub_(0.5)  # returns the very tensor that it is given


def dataset(num_images: int = 9):
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 256, (6, 6, 1), dtype=np.uint8), label)
        for label in range(6)
        for _ in range(num_images)
    ]


def few_shot(**options: Any) -> FewShotDataset:
    splits = {"train": [0, 1, 2, 3], "val": [4], "test": [5]}
    return FewShotDataset(dataset(), splits, n_way=3, k_shot=2, k_query=3, **options)


def arrays(rotations: bool = False) -> EpisodeSampler:
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 5, 5), dtype=np.uint8)
    classes = ClassImages.from_labels(images, np.repeat(np.arange(3), 4))
    return EpisodeSampler(classes, n_way=3, k_shot=1, k_query=2, rotations=rotations)


class Doubled(EpisodeSampler):
    """A user's sampler, whose tasks are more than the images in memory."""

    def sample(self, index):
        task = super().sample(index)
        return task._replace(support=task.support.map(lambda tensor: 2 * tensor))


def folder(tmp_path) -> ImageFolder:
    random = np.random.default_rng(1)
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (7, 7), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    return ImageFolder(tmp_path, split="all", n_way=2, k_shot=1, k_query=2)


def assert_same(found: Task, expected: Task) -> None:
    assert found.id == expected.id
    for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
        on_cpu = ours.numbers if isinstance(ours, Elsewhere) else ours
        assert (on_cpu.dtype, on_cpu.shape) == (theirs.dtype, theirs.shape)
        assert raw(on_cpu) == raw(theirs)
    names = [(task.support.names, task.query.names) for task in (found, expected)]
    assert names[0] == names[1]


RESIDENT = {
    "glyphs": lambda tmp_path: Glyphs(k_shot=2, k_query=3, augment=False),
    "glyphs of any family": lambda tmp_path: Glyphs(augment=False, disjoint_families=False),
    "data set": lambda tmp_path: few_shot(),
    "data set, turned": lambda tmp_path: few_shot(rotations=True),
    "arrays, turned": lambda tmp_path: arrays(rotations=True),
    "folder": folder,
}


@pytest.mark.parametrize("name", RESIDENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_cut_from_tables_has_the_bytes_of_sample(name, dtype, tmp_path):
    sampler = RESIDENT[name](tmp_path)
    assert isinstance(sampler, Resident) and sampler.table_bytes
    check_sampler(sampler, 3, processes=False, few_shot_classes=True)
    with pretending() as waits:
        feed = Feed(sampler, DEVICE, dtype, BUDGET)
        assert "stay on the device" in feed.in_words
        for indices in ((0, 1, 2), (7, 8, 9)):
            waits.clear()
            tasks = feed.tasks(Wanted(indices, 0))
            assert sum(waits.values()) == 1, waits  # the rows of all
            for index, task in zip(indices, tasks, strict=True):
                assert all(isinstance(tensor, Elsewhere) for tensor in tensors_of(task))
                assert_same(task, to_device(sampler.sample(index), "cpu", dtype))


SENT = {
    "glyphs, warped": lambda: Glyphs(),
    "data set, normalised": lambda: few_shot(transform=halved),
    "data set, changed in place": lambda: few_shot(transform=shifted),
    "data set, warped": lambda: few_shot(augment=True),
    "own": lambda: Doubled(arrays().classes, n_way=2, k_query=2),
    "no images": lambda: QuadraticSampler(),
}


@pytest.mark.parametrize("name", SENT)
def test_all_else_is_sent_in_one_piece(name):
    sampler: Any = SENT[name]()
    assert not getattr(sampler, "table_bytes", 0)
    with pretending() as waits:
        feed = Feed(sampler, DEVICE, torch.float32, BUDGET)
        assert feed.in_words == "sent with each lease"
        waits.clear()
        tasks = feed.tasks(Wanted((3, 4), 0))
        assert sum(waits.values()) == 1, waits
    for index, task in zip((3, 4), tasks, strict=True):
        assert_same(task, to_device(sampler.sample(index), "cpu", torch.float32))


def test_a_judged_split_is_warped_by_nobody():
    splits = {"train": [0], "val": [1, 2, 3], "test": [4, 5]}
    sampler = FewShotDataset(
        dataset(), splits, "val", n_way=3, k_shot=2, k_query=3, augment=True, rotations=True
    )
    assert sampler.table_bytes == sampler.size_bytes


def test_a_fixed_set_is_sent_once():
    sampler = CorruptedImages("digits", num_train=80, num_val=60, num_test=10)
    with pretending() as waits:
        feed = Feed(sampler, DEVICE, torch.float32, BUDGET)
        feed.tasks(Wanted((0,), 0))
        waits.clear()
        first, again = feed.tasks(Wanted((0, 5), 1))
        assert not waits
    assert_same(first, to_device(sample_task(sampler, 0), "cpu", torch.float32))
    assert_same(again, to_device(sample_task(sampler, 5), "cpu", torch.float32))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CorruptedImages("digits", num_train=80, num_val=60, num_test=10), "sent once, up"),
        (lambda: arrays(), "sent with each lease, since 300 bytes are more than data_budget=0"),
    ],
)
def test_what_the_budget_does_not_hold_is_sent_with_each_lease(make, words):
    sampler = make()
    with pretending() as waits:
        feed = Feed(sampler, DEVICE, torch.float32, 0)
        assert feed.in_words.startswith(words)
        for _ in range(2):
            waits.clear()
            (task,) = feed.tasks(Wanted((0,), 0))
            assert sum(waits.values()) == 1
        assert_same(task, to_device(sampler.sample(0), "cpu", torch.float32))


class Wrong(EpisodeSampler):
    """Cuts other tasks than it samples."""

    def rows(self, index):
        return super().rows(index + 1)


def test_the_check_of_samplers_compares_what_is_cut():
    sampler = Wrong(arrays().classes, n_way=3, k_shot=1, k_query=2)
    with pytest.raises(SamplerError, match=r"cut\(tables\(\), rows\(0\), 0\) must give the same"):
        check_sampler(sampler, 2, processes=False)


class Watched(Images):
    """Notes which tasks are sampled where, and fails as it is told, once."""

    def __init__(self, fails: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []
        self.fails = set(fails)

    def sample(self, index):
        self.seen.append((index, threading.current_thread() is threading.main_thread()))
        if index in self.fails:
            self.fails.discard(index)
            raise OSError(f"disk of task {index}")
        return super().sample(index)


class Stepwise(Watched):
    """A stream: other data at each step."""

    def sample_at(self, index, step):
        assert step < 3, "past the end"
        return self.sample(index + 100 * step)._replace(id=index)


def run(sampler, monkeypatch, num_steps=3, tasks_per_lease=2) -> tuple[list[Any], Any]:
    """(reports, x) of a run on the device."""
    problem = FewShotProblem(small_conv4(), adapt="head")
    work = Workload(
        *(problem, sampler, ITD(inner_steps=1, inner_lr=0.1)),
        meta_batch_size=4,
        tasks_per_lease=tasks_per_lease,
        compute=Compute(device="cpu"),
    )
    optimizer = OuterOptimizer("sgd", 0.1)
    state = OuterVariable(problem.init_outer(generator(0)), optimizer).state()
    executor = LocalExecutor(backoff_s=0.0)
    with pretending():
        monkeypatch.setattr("metadist.executor.pick_device", lambda device: DEVICE)
        executor.start(work, optimizer, state)
        assert executor.describe()["data"] == "sent with each lease"
        reports = list(executor.run(num_steps))
        return reports, executor.state().outer


@pytest.mark.parametrize("kind", [Watched, Stepwise])
def test_the_next_lease_is_sampled_while_one_is_computed_and_nothing_past_the_end(
    kind, monkeypatch
):
    sampler = kind()
    packed_by = set()

    def pack(*arguments: Any) -> Packed:
        packed_by.add(threading.current_thread())
        return pack_as_ever(*arguments)

    pack_as_ever = Packed.of
    monkeypatch.setattr(Packed, "of", pack)
    run(sampler, monkeypatch)
    # Another thread may not ask CUDA for pinned memory while a graph is recorded.
    assert packed_by == {threading.main_thread()}
    step = 100 if kind is Stepwise else 0
    assert [index for index, _ in sampler.seen] == [n + (n // 4) * step for n in range(12)]
    assert [here for _, here in sampler.seen] == [True] * 2 + [False] * 10


def test_an_error_ahead_of_time_is_one_of_its_own_lease(monkeypatch):
    plain, expected = run(Watched(), monkeypatch)
    sampler = Watched(fails=(2, 5))
    reports, found = run(sampler, monkeypatch)
    assert [[text.partition(":")[0] for text in report.retried] for report in reports] == [
        ["lease 1 (tasks 2, 3)"],
        ["lease 2 (tasks 4, 5)"],
        [],
    ]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [report.step.applied for report in reports] == [r.step.applied for r in plain]


def run_on_cpu(sampler, num_steps=3):
    """The x of a run of one process, whose leases sample their own tasks."""
    problem, optimizer = Quadratic(2, 4), OuterOptimizer("sgd", 0.1)
    work = Workload(
        *(problem, sampler, ITD(inner_steps=1, inner_lr=0.1)),
        meta_batch_size=4,
        tasks_per_lease=2,
        compute=Compute(device="cpu"),
    )
    executor = LocalExecutor(backoff_s=0.0)
    executor.start(
        work, optimizer, OuterVariable(problem.init_outer(generator(0)), optimizer).state()
    )
    list(executor.run(num_steps))
    assert "data" not in executor.describe()
    return executor.state().outer


class Slow(QuadraticSampler):
    """Takes its time, and notes which tasks are sampled where, in order."""

    def __init__(self, seconds: float = 0.004) -> None:
        super().__init__()
        self.seconds = seconds
        self.seen: list[tuple[int, bool]] = []
        self.num_inside = 0

    def sample(self, index):
        self.num_inside += 1
        assert self.num_inside == 1, "two threads sample"
        self.seen.append((index, threading.current_thread() is threading.main_thread()))
        time.sleep(self.seconds)
        self.num_inside -= 1
        return super().sample(index)


def test_on_a_cpu_the_leases_of_one_process_sample_their_own_tasks():
    sampler = Slow(0.003)
    run_on_cpu(sampler)
    assert sampler.seen == [(index, True) for index in range(12)]


def feed_on_cpu(sampler, budget: int = BUDGET, **options) -> Feed:
    return Feed(sampler, torch.device("cpu"), torch.float64, budget, **options)


def ask(feed: Feed, *indices: int, then: tuple[int, ...] = (), step: int = 0) -> list[Task]:
    feed.next = Wanted(then, step) if then else None
    return feed.tasks(Wanted(indices, step))


@pytest.mark.parametrize(("worth_s", "is_here"), [(0.0, False), (float("inf"), True)])
def test_what_is_quick_is_not_sampled_ahead_on_a_cpu(worth_s, is_here, monkeypatch):
    monkeypatch.setattr("metadist.feed.WORTH_S", worth_s)
    feed = feed_on_cpu(sampler := Slow(0.0))
    for index in (0, 1):
        ask(feed, index, then=(index + 1,))
    feed.settle()
    assert sampler.seen[1] == (1, is_here)


def test_what_the_budget_does_not_hold_is_not_sampled_ahead():
    size = sum(tensor.nbytes for tensor in tensors_of(QuadraticSampler().sample(0)))
    for budget, is_here in ((size, False), (size - 1, True), (0, True)):
        feed = feed_on_cpu(sampler := Slow(), budget)
        for index in (0, 1):
            ask(feed, index, then=(index + 1,))
        feed.settle()
        assert sampler.seen[1] == (1, is_here)


def test_what_was_sampled_for_a_lease_that_never_comes_disturbs_no_other():
    sampler = Slow()
    feed = feed_on_cpu(sampler)
    for given in ((0, 1), (8, 9), (4, 5), (6, 7)):  # the third is what was foretold
        for index, task in zip(given, ask(feed, *given, then=(4, 5)), strict=True):
            assert_same(task, QuadraticSampler().sample(index))
    assert [number for number, _ in sampler.seen].count(4) <= 2  # once more for the fourth


def test_a_lease_that_nobody_wants_any_more_ends_with_the_task_it_is_at():
    feed = feed_on_cpu(sampler := Slow())
    ask(feed, 0, then=tuple(range(10, 60)))
    ahead: Any = feed._ahead
    ask(feed, 1, then=(2,))
    assert not ahead.is_wanted
    feed.settle()
    sampler.seen.clear()
    feed._prepare(Wanted(tuple(range(10, 60)), 0), lambda: len(sampler.seen) < 3)
    assert [index for index, _ in sampler.seen] == [10, 11, 12]


class Numbered(Slow):
    """A stream."""

    def sample_at(self, index, step):
        return self.sample(index + 100 * step)._replace(id=index)


def test_a_stream_is_sampled_again_where_another_step_was_foretold():
    sampler = Numbered(0.01)
    feed = feed_on_cpu(sampler)
    feed.next = Wanted((1,), 1)
    feed.tasks(Wanted((0,), 0))
    feed.settle()
    (task,) = feed.tasks(Wanted((1,), 2))
    assert_same(task, QuadraticSampler().sample(201)._replace(id=1))
    assert [index for index, _ in sampler.seen] == [0, 101, 201]
    # Of other samplers the step does not matter.
    feed = feed_on_cpu(plain := Slow(0.01))
    feed.next = Wanted((1,), 1)
    feed.tasks(Wanted((0,), 0))
    feed.tasks(Wanted((1,), 5))
    assert [index for index, _ in plain.seen] == [0, 1]


class OfOneThread(Slow):
    """As a connection to SQLite, of the thread that has made it."""

    def __init__(self) -> None:
        super().__init__(0.01)
        self.thread = threading.current_thread()

    def sample(self, index):
        if threading.current_thread() is not self.thread:
            raise ValueError("of another thread")
        return super().sample(index)


def test_an_error_that_may_come_of_the_thread_is_the_last_one():
    feed = feed_on_cpu(sampler := OfOneThread())
    ask(feed, 0, then=(1,))
    with pytest.raises(ValueError, match="of another thread"):
        ask(feed, 1, then=(2,))
    for index in range(1, 5):
        ask(feed, index, then=(index + 1,))
    assert sampler.seen == [(index, True) for index in range(5)]


class Borrows(Slow):
    """Gives torch's generator back as it was, which a check of what it left cannot see."""

    def sample(self, index):
        with torch.random.fork_rng():
            torch.manual_seed(index)
            return super().sample(index)


def test_who_borrows_the_global_generator_is_not_sampled_beside_a_computation():
    feed = feed_on_cpu(sampler := Borrows(0.01))
    for index in range(3):
        ask(feed, index, then=(index + 1,))
    feed.settle()
    assert sampler.seen == [(index, True) for index in range(3)]


def test_what_is_sampled_ahead_has_the_threads_of_a_lease():
    class Threads(Slow):
        def sample(self, index):
            self.threads = torch.get_num_threads()
            return super().sample(index)

    before = torch.get_num_threads()
    feed = feed_on_cpu(sampler := Threads(0.01), num_threads=3)
    ask(feed, 0, then=(1,))
    feed.settle()
    assert (sampler.threads, torch.get_num_threads()) == (3, before)


def test_tensors_of_every_kind_are_packed():
    batch = Batch.named(
        inputs=torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        mask=torch.tensor([True, False, True]),
        none=torch.zeros(3, 0),
        small=torch.arange(3, dtype=torch.int8),
        targets=torch.arange(3),
    )
    task = Task(batch, batch.take(torch.tensor([2, 0])), 4)

    class One:
        def sample(self, index):
            return task._replace(id=index)

    with pretending():
        (found,) = Feed(One(), DEVICE, torch.float64, 0).tasks(Wanted((4,), 0))
    assert_same(found, to_device(task, "cpu", torch.float64))

"""The conformance test finds what it is there for, and passes what we ship."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from metadist.checks.sampler import SamplerError, check_sampler
from metadist.task import Batch, Task
from metadist.tasks import EpisodeSampler, FewShotDataset, Glyphs, ImageFolder, Sinusoid
from tests.tasks.helpers import striped, write_tree


def tables(index: int, n_way: int = 3, shift: int = 0) -> Task:
    """A fine classification task on made-up features."""
    rng = np.random.default_rng([shift, index])

    def batch(count: int) -> Batch:
        labels = torch.arange(n_way).repeat_interleave(count)
        return Batch.of(torch.from_numpy(rng.normal(size=(len(labels), 4))), labels)

    return Task(batch(1), batch(2), index)


@dataclass
class Sampler:
    """A user's sampler: `change` spoils the good task."""

    change: Callable[[Task, int], Any] | None = None
    shift: int = 0
    n_way: int = 3

    def sample(self, index: int) -> Any:
        task = tables(index, shift=self.shift)
        return task if self.change is None else self.change(task, index)


def violations(sampler: Any, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(SamplerError) as caught:
        check_sampler(sampler, **({"processes": False} | arguments))
    assert isinstance(caught.value, ValueError)
    return caught.value.violations


def support(task: Task, *tensors: torch.Tensor) -> Task:
    return task._replace(support=Batch.of(*tensors))


def test_a_good_sampler_is_reported():
    report = check_sampler(Sampler(), processes=False, other=Sampler(shift=1))
    assert (report.n_way, report.support_shapes, report.query_shapes) == (
        3,
        ((3, 4), (3,)),
        ((6, 4), (6,)),
    )
    assert report.constant_shapes and report.distinct_tasks == report.num_tasks == 20
    lines = str(report).splitlines()
    assert lines[0] == "Sampler: 20 tasks, 20 different, 3-way"
    assert lines[1] == "  support 3x4 and 3, query 6x4 and 6; the same in all tasks"
    assert lines[2] == "  deterministic in this process only"
    assert lines[3].endswith("bytes pickled")


def longer(task: Task, index: int) -> Task:
    x = torch.from_numpy(np.random.default_rng(index).normal(size=(2 + index, 1)))
    return Task(Batch.of(x, x + 1), Batch.of(x + 10, x + 11), index)


def test_unequal_tasks_and_regression_are_allowed():
    report = check_sampler(Sampler(longer), processes=False)
    assert report.n_way is None and not report.constant_shapes
    assert "no class labels" in str(report) and "not the same in all tasks" in str(report)


def query(task: Task, *tensors: torch.Tensor) -> Task:
    return task._replace(query=Batch.of(*tensors))


def unchecked(task: Task, tensors: Any, index: Any) -> Task:
    return task._replace(query=Batch(tensors, index))


def leaking(task: Task, index: int) -> Task:
    pairs = zip(task.query.tensors, task.support.tensors, strict=True)
    return query(task, *(torch.cat(pair) for pair in pairs))


def drifting(task: Task, index: int) -> Task:
    x, y = task.support.tensors
    return support(task, x + next(COUNTER), y)


COUNTER = itertools.count()
ONE, TWO, THREE = torch.tensor(1.0), torch.ones(2), torch.ones(3)
SPOILED: dict[str, Callable[[Task, int], Any]] = {
    "sample must return a metadist.task.Task, got tuple (task 0)": lambda t, i: (t, i),
    "query must be a metadist.task.Batch, got tuple (task 0)": (
        lambda t, i: Task(t.support, cast(Any, t.query.tensors), i)
    ),
    "query.tensors must be a non-empty tuple of tensors, got [": (
        lambda t, i: unchecked(t, list(t.query.tensors), t.query.index)
    ),
    "query.tensors must be a non-empty tuple of tensors, got () (task 0)": (
        lambda t, i: unchecked(t, (), t.query.index)
    ),
    "query.tensors must have an axis of examples, got a scalar (task 0)": (
        lambda t, i: unchecked(t, (ONE,), t.query.index)
    ),
    "query.tensors must have one length >= 1 along axis 0, got [(2,), (3,)] (task 0)": (
        lambda t, i: unchecked(t, (TWO, THREE), t.query.index)
    ),
    "query.tensors must have one length >= 1 along axis 0, got [(0,)] (task 0)": (
        lambda t, i: unchecked(t, (TWO[:0],), t.query.index[:0])
    ),
    "query.index must be int64 0, 1, ... 5, got tensor([1, 2, 3, 4, 5, 6]) (task 0): build the set "
    "with Batch.of(...)": lambda t, i: unchecked(t, t.query.tensors, t.query.index + 1),
    "id must be the index, got 1 (task 0)": lambda t, i: t._replace(id=i + 1),
    "support.tensors[0] must be finite, got NaN or Inf (task 0)": (
        lambda t, i: support(t, t.support.tensors[0] / 0, t.support.tensors[1])
    ),
    "labels of support must be int64, got torch.int32 (task 0)": (
        lambda t, i: support(t, t.support.tensors[0], t.support.tensors[1].int())
    ),
    "labels of support must be 0 .. N-1 with each present, got [0, 2, 4] (task 0): number the "
    "classes of each task anew": (
        lambda t, i: support(t, t.support.tensors[0], 2 * t.support.tensors[1])
    ),
    "labels of query must occur in support, got [1, 2] besides (task 0)": (
        lambda t, i: support(t, t.support.tensors[0], 0 * t.support.tensors[1])
    ),
    "support and query must be disjoint, got 3 query examples that are in the support set, such as "
    "6 (task 0): draw both sets in one go without replacement, or pass allow_equal_examples=True "
    "if different examples may be equal": leaking,
    "sample(0) must give the same bytes again, got others: seed all randomness with (seed, split, "
    "index) and keep no state": drifting,
}


@pytest.mark.parametrize("message", SPOILED, ids=range(len(SPOILED)))
def test_each_violation_is_found_once_and_explained(message: str):
    found = [v for v in violations(Sampler(SPOILED[message])) if v.startswith(message)]
    assert len(found) == 1


def test_all_violations_come_together():
    def change(task: Task, index: int) -> Task:
        x, y = task.support.tensors
        return support(task, x / 0, y.int())._replace(id=-1)

    with pytest.raises(SamplerError) as caught:
        check_sampler(Sampler(change), processes=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "Sampler breaks the contract of a task sampler:"
    assert [line[:7] for line in lines[1:]] == ["  - id ", "  - sup", "  - lab", "  - a s"]


def rebuilt(function: Callable[[torch.Tensor, torch.Tensor], Batch]) -> Callable[..., Task]:
    """A change of both sets of a task."""

    def change(task: Task, index: int) -> Task:
        support, query = function(*task.support.tensors), function(*task.query.tensors)
        return Task(support, query, index)

    return change


def anew(task: Task, index: int) -> Task:
    return rebuilt(lambda x, y: Batch.of(x, 7 * y - 5))(task, index)


def test_targets_that_are_no_classes_may_be_any_integers():
    assert (
        "number the classes of each task anew; where targets are other numbers"
        in (violations(Sampler(anew))[0])
    )
    report = check_sampler(Sampler(anew), processes=False, few_shot_classes=False)
    assert report.n_way is None
    assert check_sampler(Unsaid(), processes=False).n_way is None


class Unsaid:
    """Labels of one's own, and nothing said about them."""

    def sample(self, index: int) -> Task:
        return anew(tables(index), index)


def with_names(task: Task, index: int) -> Task:
    return rebuilt(lambda x, y: Batch.named(targets=y, inputs=x, ids=y + 40))(task, index)


def without_names(task: Task, index: int) -> Task:
    return rebuilt(lambda x, y: Batch.of(x, y, y + 40))(task, index)


def test_classes_are_found_by_name_and_never_guessed():
    assert check_sampler(Sampler(with_names), processes=False).n_way == 3
    found = violations(Sampler(without_names))
    assert found[0].startswith("the targets must be named in a batch of more than two tensors, got")


def test_leaks_of_regression_are_found_and_may_be_allowed():
    assert "got 1 query examples that are in the support set" in violations(Repeated())[0]
    assert check_sampler(Repeated(), processes=False, allow_equal_examples=True).distinct_tasks == 1


class Repeated:
    def sample(self, index: int) -> Task:
        x = torch.tensor([[1.0], [2.0]])
        return Task(Batch.of(x, x), Batch.of(x[1:], x[1:]), index)


class Global:
    def sample(self, index: int) -> Task:
        torch.manual_seed(index)
        x = torch.randn(6, 1)
        return Task(Batch.of(x[:3], x[:3]), Batch.of(x[3:], x[3:]), index)


def test_reseeding_the_global_state_is_found():
    before = torch.get_rng_state()
    try:
        assert violations(Global()) == (
            "sample must leave global random states alone, got that of torch changed: use a "
            "generator of your own, seeded with (seed, split, index)",
        )
    finally:
        torch.set_rng_state(before)


def test_what_cannot_be_pickled_is_found():
    found = violations(Sampler(lambda task, index: task))
    assert len(found) == 1
    assert found[0].startswith("a sampler must be picklable, because it travels to workers, got ")


class Forgetful:
    """Loses its seed on the way to a worker."""

    def __init__(self) -> None:
        self.seed = 5

    def __getstate__(self) -> dict[str, int]:
        return {"seed": 6}

    def sample(self, index: int) -> Task:
        return tables(index, shift=self.seed)


def test_copies_that_differ_are_found():
    assert violations(Forgetful())[0].startswith("sample(0) of a pickled copy must give the same b")


def test_what_fails_is_shown():
    def change(task: Task, index: int) -> Task:
        raise KeyError("no such row")

    assert violations(Sampler(change)) == (
        "sample(index) must give a task, got KeyError('no such row')",
    )
    for value in (object(), np.zeros((3, 2)), DataLoader(TensorDataset(TWO))):
        expected = (
            f"it must have a method sample(index) -> Task, got {type(value).__name__} without"
        )
        assert (
            violations(value)[0].startswith(expected) and "FewShotDataset(" in violations(value)[0]
        )


def test_splits_that_share_examples_or_classes_are_found():
    assert (
        "splits must share no example, got 180 in tasks 0 .. 19 of both"
        in violations(Sampler(), other=Sampler())[0]
    )
    train, test = (EpisodeSampler(striped(6, 4), k_query=2, split=s) for s in ("train", "test"))
    assert violations(train, other=test)[0] == (
        "splits must share no class, got 6 in both, such as '0': split by class, and give every "
        "class a name of its own"
    )


@pytest.mark.parametrize("num_tasks", [1, 2.0])
def test_the_number_of_tasks_is_checked(num_tasks: Any):
    with pytest.raises(ValueError, match=r"^num_tasks must be an integer >= 2, got "):
        check_sampler(Sampler(), num_tasks=num_tasks)


class Hashed:
    """Differs between processes, because hash() of a string does."""

    def sample(self, index: int) -> Task:
        return tables(index, shift=abs(hash("train")))


def test_a_hash_in_the_seed_is_found_by_a_fresh_process():
    assert check_sampler(Hashed(), processes=False).distinct_tasks == 20
    assert violations(Hashed(), processes=True) == (
        "sample(0) must give the same bytes in another process, got others: seed all randomness "
        "with (seed, split, index) and keep no state; do not use hash(), the order of sets, the "
        "time or the number of threads",
    )


class Numbers:
    """A small data set; its pictures are arrays."""

    targets = tuple(label for label in range(6) for _ in range(4))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(position)
        return rng.integers(0, 256, (8, 8), dtype=np.uint8), self.targets[position]


class Several:
    """The tasks of several samplers in turn: starting a process takes seconds."""

    def __init__(self, *samplers: Any) -> None:
        self.samplers = samplers

    def sample(self, index: int) -> Task:
        turn, which = divmod(index, len(self.samplers))
        return self.samplers[which].sample(turn)._replace(id=index)


def test_all_samplers_draw_the_same_tasks_in_another_process(tmp_path: Path):
    write_tree(tmp_path, ["a", "b", "c"])
    samplers = Several(
        Sinusoid(seed=3),
        EpisodeSampler(striped(9, 4), k_query=3, rotations=True),
        FewShotDataset(Numbers(), {"train": [0, 1, 2]}, n_way=2, k_query=2),
        ImageFolder(tmp_path, split="all", n_way=2, k_query=2),
        Glyphs(k_shot=2),
        Glyphs(split="val", augment=False),
        Sampler(),
    )
    report = check_sampler(samplers, num_tasks=50)
    assert report.processes and report.distinct_tasks == 50
    assert "deterministic in this process and a fresh process" in str(report)


@dataclass
class Streaming:
    """A stream of a user: `change` spoils the good task."""

    change: Callable[[Task, int, int], Any] | None = None
    num_steps: int = 40

    def sample(self, index: int) -> Any:
        return self.sample_at(index, 0)

    def sample_at(self, index: int, step: int) -> Any:
        assert step < self.num_steps
        task = tables(index, shift=step)
        return task if self.change is None else self.change(task, index, step)


class Remembering(Streaming):
    """Its support set also has what the call before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: Batch | None = None

    def sample_at(self, index: int, step: int) -> Any:
        task = tables(index, shift=step)
        before, self.memory = self.memory or task.support, task.support
        both = zip(task.support.tensors, before.tensors, strict=True)
        return support(task, *(torch.cat(pair) for pair in both))


class OtherStart(Streaming):
    def sample(self, index: int) -> Any:
        return self.sample_at(index, 1)


class HashedSteps(Streaming):
    """Depends on the hash seed of the process, from step 17 on."""

    def sample_at(self, index: int, step: int) -> Any:
        return tables(index, shift=hash(str(step)) % 2**31 if step >= 17 else step)


class ProcessBound(Streaming):
    """What a pickled copy has forgotten, from step 2 on."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = 5

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "offset": 6}

    def sample_at(self, index: int, step: int) -> Any:
        return tables(index, shift=step + self.offset * (step >= 2))


def test_a_stream_is_looked_at_at_several_steps_and_its_last():
    seen = set()

    def watch(task: Task, index: int, step: int) -> Task:
        seen.add(step)
        return task

    sampler = Streaming(watch)
    sampler.__class__ = type("Local", (Streaming,), {"__reduce__": lambda self: (Streaming, ())})
    report = check_sampler(sampler, 2, processes=False)
    assert seen == {0, 1, 2, 17, 39}
    assert report.distinct_tasks == report.num_tasks == 2
    assert check_sampler(Streaming(num_steps=1), 2, processes=False).num_tasks == 2


def test_a_stream_that_is_no_function_of_index_and_step_is_found():
    seeds = "seed all randomness with (seed, split, index, step) and keep no state"
    again = "must give the same bytes again, got others: " + seeds
    assert violations(Remembering(), allow_equal_examples=True)[0].endswith(again)
    copied = "of a pickled copy must give the same bytes, got others: " + seeds
    assert violations(ProcessBound()) == (f"sample_at(0, 2) {copied}",)
    assert violations(OtherStart()) == (
        "sample(0) must give the same bytes as sample_at(0, 0), got others: write "
        "`return self.sample_at(index, 0)` as the body of sample",
    )
    assert violations(HashedSteps(), processes=True)[0].startswith(
        "sample_at(0, 17) must give the same bytes in another process"
    )


def test_the_faults_of_a_stream_name_their_step():
    def late(task: Task, index: int, step: int) -> Any:
        return task if step < 17 else support(task, task.support.tensors[0] * torch.nan)

    assert "got NaN or Inf (task 0 at step 17)" in violations(Streaming(late))[0]

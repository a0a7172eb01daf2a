"""The conformance test of task samplers, for the samplers of users too."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.checks.values import normal_form, require_integer
from metadist.sampler import (
    NamedClasses,
    Resident,
    Stream,
    num_steps_of,
    num_tasks_of,
    require_sampler,
    sample_task,
)
from metadist.task import Batch, Task, shape_signature, targets_of
from metadist.trees import as_bytes

OTHER_TARGETS = (
    "; where targets are other numbers: few_shot_classes=False, in training a problem without it "
    "(FewShotProblem with its loss as a function, such as torch.nn.functional.cross_entropy)"
)


@dataclass(frozen=True)
class _Place:
    """A task of a sampler; `step` is None if it is no stream."""

    index: int
    step: int | None = None

    def __str__(self) -> str:
        return f"task {self.index}" + ("" if self.step is None else f" at step {self.step}")

    @property
    def call(self) -> str:
        """What gives it."""
        if self.step is None:
            return f"sample({self.index})"
        return f"sample_at({self.index}, {self.step})"

    def of(self, sampler: Any) -> Task:
        return sample_task(sampler, self.index, self.step or 0)


STEPS = (0, 1, 2, 17)
"""The outer steps at which a stream is looked at, and its last one."""


def _places(sampler: Any, num_tasks: int) -> list[_Place]:
    if not isinstance(sampler, Stream):
        return [_Place(index) for index in range(num_tasks)]
    limit = num_steps_of(sampler)
    steps = {*STEPS} if limit is None else {min(step, limit - 1) for step in (*STEPS, limit)}
    return [_Place(index, step) for step in sorted(steps) for index in range(num_tasks)]


class SamplerError(ValueError):
    """A sampler breaks its contract; `violations` lists every way in which it does."""

    def __init__(self, name: str, violations: list[str]) -> None:
        super().__init__(
            f"{name} breaks the contract of a task sampler:\n  - " + "\n  - ".join(violations)
        )
        self.violations = tuple(violations)


@dataclass(frozen=True)
class SamplerReport:
    """Facts about a sampler that passed `check_sampler`."""

    name: str
    num_tasks: int
    n_way: int | None  # None: not a classification
    support_shapes: tuple[tuple[int, ...], ...]  # of the first task
    query_shapes: tuple[tuple[int, ...], ...]
    constant_shapes: bool  # unequal tasks cannot be stacked: vectorize=False
    distinct_tasks: int
    tasks_per_second: float
    pickle_bytes: int
    processes: bool  # also compared with a fresh process

    def __str__(self) -> str:
        kind = "no class labels" if self.n_way is None else f"{self.n_way}-way"
        shapes = "the same in all tasks" if self.constant_shapes else "not the same in all tasks"
        compared = "and a fresh process" if self.processes else "only"
        return "\n".join(
            (
                f"{self.name}: {self.num_tasks} tasks, {self.distinct_tasks} different, {kind}",
                f"  support {_sizes(self.support_shapes)}, query {_sizes(self.query_shapes)}; "
                f"{shapes}",
                f"  deterministic in this process {compared}",
                f"  {self.tasks_per_second:,.0f} tasks/s, {self.pickle_bytes:,} bytes pickled",
            )
        )


def check_sampler(
    sampler: Any,
    num_tasks: int = 20,
    processes: bool = True,
    other: Any = None,
    allow_equal_examples: bool = False,
    few_shot_classes: bool | None = None,
) -> SamplerReport:
    """Facts about a sampler that keeps the contract of `metadist.sampler.TaskSampler`.

    Checked on the tasks 0 .. num_tasks-1: they are Tasks of Batches with equal lengths and
    `index = 0, 1, ...`; `id` is the index; numbers are finite; integer targets, where they are the
    classes of a task, are int64 and 0 .. N-1 with each of them in the support set; the same
    index gives the same bytes again, in another order, from a pickled copy and, with `processes`,
    in a fresh process with another hash seed and another number of threads; the global random
    states are left alone; no example is in both sets.

    A `Stream` is looked at in the same way at several outer steps, and `sample` must be its step 0.

    Examples are compared byte by byte: the inputs of a classification, inputs and targets of
    anything else. Continuous data almost never repeats by chance, so an example in both sets is
    a leak there too. What this cannot see: an example that comes back augmented.

    Args:
        sampler: The sampler; it must be picklable, because it travels to workers.
        num_tasks: >= 2.
        processes: Start a Python process (some seconds). In a script, call this under
            `if __name__ == "__main__":`.
        other: a sampler of another split, which must share no example with this one; nor a class
            if both have `class_names`.
        allow_equal_examples: For data in which different examples may be equal (tables of small
            integers, blank images): skips the comparisons of examples.
        few_shot_classes: Whether the targets are the classes of a task, 0 .. N-1; False: they
            may be any numbers (-1 and 1, counts, ratings); None: whether the sampler has an
            attribute `n_way`.

    Raises:
        SamplerError: At least one rule is broken; it lists all that are.
    """
    require_integer("num_tasks", num_tasks, 2)
    if few_shot_classes is None:
        few_shot_classes = hasattr(sampler, "n_way")
    name = type(sampler).__name__
    try:
        require_sampler("it", sampler)
        num_tasks_of(sampler)
        places = _places(sampler, num_tasks)
    except ValueError as error:
        raise SamplerError(name, [str(error)]) from None
    states = _random_states()
    start = time.perf_counter()
    try:
        tasks = [place.of(sampler) for place in places]
    except Exception as error:
        call = "sample(index)" if places[0].step is None else "sample_at(index, step)"
        raise SamplerError(name, [f"{call} must give a task, got {error!r}"]) from error
    seconds = time.perf_counter() - start
    now = _random_states()
    violations = [
        f"sample must leave global random states alone, got that of {owner} changed: use a "
        "generator of your own, seeded with (seed, split, index)"
        for owner in states
        if states[owner] != now[owner]
    ]
    malformed = [
        violation
        for place, task in zip(places, tasks, strict=True)
        for violation in _malformed(task, place)
    ]
    if malformed:
        raise SamplerError(name, _first_of_each(violations + malformed))
    for place, task in zip(places, tasks, strict=True):
        violations += _wrong_values(task, place)
        violations += _wrong_classes(task, place) if few_shot_classes else ()
        if not allow_equal_examples:
            violations += _leaks(task, place)
    digests = [_digest(task) for task in tasks]
    violations += _irreproducible(sampler, places, digests, processes)
    if isinstance(sampler, Stream):
        size = num_tasks_of(sampler) or num_tasks
        violations += _other_start(sampler, digests[: min(size, num_tasks)])
    violations += _other_cut(sampler, digests)
    if other is not None:
        violations += _impure(sampler, other, tasks, num_tasks, allow_equal_examples)
    if violations:
        raise SamplerError(name, _first_of_each(violations))
    return SamplerReport(
        name=name,
        num_tasks=num_tasks,
        n_way=_n_way(tasks[0]) if few_shot_classes else None,
        support_shapes=tuple(tuple(t.shape) for t in tasks[0].support.tensors),
        query_shapes=tuple(tuple(t.shape) for t in tasks[0].query.tensors),
        constant_shapes=len({shape_signature(task) for task in tasks}) == 1,
        distinct_tasks=len(set(digests[:num_tasks])),
        tasks_per_second=len(tasks) / seconds,
        pickle_bytes=len(pickle.dumps(sampler)),
        processes=processes,
    )


def _malformed(task: Any, place: _Place) -> Iterator[str]:
    """The faults of a task that rule out all further checks."""
    if not isinstance(task, Task):
        yield f"sample must return a metadist.task.Task, got {type(task).__name__} ({place})"
        return
    sets: dict[str, Any] = {"support": task.support, "query": task.query}
    for name, batch in sets.items():
        if not isinstance(batch, Batch):
            yield f"{name} must be a metadist.task.Batch, got {type(batch).__name__} ({place})"
            continue
        tensors = batch.tensors
        if not isinstance(tensors, tuple) or not tensors or not _all_tensors(tensors):
            yield (
                f"{name}.tensors must be a non-empty tuple of tensors, got {_kinds(tensors)} "
                f"({place})"
            )
            continue
        if any(tensor.ndim == 0 for tensor in tensors):
            yield f"{name}.tensors must have an axis of examples, got a scalar ({place})"
            continue
        lengths = {len(tensor) for tensor in tensors}
        if len(lengths) > 1 or 0 in lengths:
            yield (
                f"{name}.tensors must have one length >= 1 along axis 0, got "
                f"{[tuple(tensor.shape) for tensor in tensors]} ({place})"
            )
            continue
        expected = torch.arange(lengths.pop())
        given = batch.index
        if not isinstance(given, Tensor) or not torch.equal(given.cpu(), expected):
            yield (
                f"{name}.index must be int64 0, 1, ... {len(expected) - 1}, got "
                f"{given!r:.60} ({place}): build the set with Batch.of(...)"
            )


def _kinds(tensors: Any) -> str:
    """The types of what should be tensors: no numbers in a message."""
    if not isinstance(tensors, tuple | list):
        return type(tensors).__name__
    inside = ", ".join(type(tensor).__name__ for tensor in tensors[:8])
    return f"({inside})" if isinstance(tensors, tuple) else f"[{inside}]"


def _wrong_values(task: Task, place: _Place) -> Iterator[str]:
    if (
        isinstance(task.id, bool)
        or not isinstance(task.id, int | np.integer)
        or task.id != place.index
    ):
        yield f"id must be the index, got {task.id!r} ({place})"
    for name, batch in (("support", task.support), ("query", task.query)):
        for position, tensor in enumerate(batch.tensors):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                yield f"{name}.tensors[{position}] must be finite, got NaN or Inf ({place})"


def _wrong_classes(task: Task, place: _Place) -> Iterator[str]:
    try:
        labels, asked = _classes_of(task.support), _classes_of(task.query)
    except ValueError as error:
        yield f"{error} ({place})"
        return
    if labels is None or asked is None:
        return
    for name, tensor in (("support", labels), ("query", asked)):
        if tensor.dtype != torch.int64:
            yield f"labels of {name} must be int64, got {tensor.dtype} ({place})"
    present = labels.unique().tolist()
    if present != list(range(len(present))):
        yield (
            f"labels of support must be 0 .. N-1 with each present, got {_few(present)} ({place}): "
            f"number the classes of each task anew{OTHER_TARGETS}"
        )
    unseen = sorted(set(asked.unique().tolist()) - set(present))
    if unseen:
        yield (
            f"labels of query must occur in support, got {_few(unseen)} besides ({place})"
            f"{OTHER_TARGETS}"
        )


def _leaks(task: Task, place: _Place) -> Iterator[str]:
    support, query = set(_examples(task.support)), _examples(task.query)
    both = [position for position, example in enumerate(query) if example in support]
    if both:
        yield (
            f"support and query must be disjoint, got {len(both)} query examples that are in the "
            f"support set, such as {both[0]} ({place}): draw both sets in one go without "
            "replacement, or pass allow_equal_examples=True if different examples may be equal"
        )


def _other_start(stream: Stream, digests: list[bytes]) -> Iterator[str]:
    for index, digest in enumerate(digests):
        if _digest(stream.sample(index)) != digest:
            yield (
                f"sample({index}) must give the same bytes as sample_at({index}, 0), got others: "
                "write `return self.sample_at(index, 0)` as the body of sample"
            )
            return


def _other_cut(sampler: Any, digests: list[bytes]) -> Iterator[str]:
    """A violation where tasks that are cut from tables are others than those of `sample`."""
    if isinstance(sampler, Stream) or not isinstance(sampler, Resident) or not sampler.table_bytes:
        return
    tables = sampler.tables()
    for index, digest in enumerate(digests):
        if _digest(sampler.cut(tables, sampler.rows(index), index)) != digest:
            yield (
                f"cut(tables(), rows({index}), {index}) must give the same bytes as "
                f"sample({index}), got others: return 0 as table_bytes where samples are more "
                "than numbers of the tables"
            )
            return


def _irreproducible(
    sampler: Any, places: list[_Place], digests: list[bytes], processes: bool
) -> Iterator[str]:
    backwards = places[::-1]
    of_what = "(seed, split, index)" if places[0].step is None else "(seed, split, index, step)"
    advice = f"seed all randomness with {of_what} and keep no state"
    again = _digests(sampler, backwards)[::-1]
    if (got := _differing(digests, again)) is not None:
        yield f"{places[got].call} must give the same bytes again, got others: {advice}"
        return
    try:
        pickled = pickle.dumps(sampler)
    except Exception as error:  # noqa: BLE001  # whatever a user's class raises is the finding
        yield (
            f"a sampler must be picklable, because it travels to workers, got {error!r}: keep no "
            "lambdas, open files or generators in it"
        )
        return
    if processes:
        yield from _other_process(pickled, digests, places, advice)
    elif (got := _differing(digests, _digests(pickle.loads(pickled), backwards)[::-1])) is not None:
        call = places[got].call
        yield f"{call} of a pickled copy must give the same bytes, got others: {advice}"


def _other_process(
    pickled: bytes, digests: list[bytes], places: list[_Place], advice: str
) -> Iterator[str]:
    threads = 2 if torch.get_num_threads() == 1 else 1
    try:
        there = in_fresh_process(_digests_there, pickled, places[::-1], threads)[::-1]
    except BrokenProcessPool:
        yield (
            "a fresh process must be able to start, got none: call check_sampler under "
            '`if __name__ == "__main__":`, or pass processes=False'
        )
    except Exception as error:  # noqa: BLE001  # whatever a user's class raises is the finding
        yield (
            f"sample must work in a fresh process, got {error!r}: define the sampler in a module "
            "that can be imported there, and have its files there"
        )
    else:
        if (got := _differing(digests, there)) is not None:
            yield (
                f"{places[got].call} must give the same bytes in another process, got others: "
                f"{advice}; do not use hash(), the order of sets, the time or the number of threads"
            )


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a new Python process with another hash seed."""
    context = multiprocessing.get_context("spawn")
    with _hash_seed(), ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def _hash_seed() -> Iterator[None]:
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "1" if before != "1" else "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before


def _impure(
    sampler: Any, other: Any, tasks: list[Task], num_tasks: int, allow_equal_examples: bool
) -> Iterator[str]:
    names: set[str] = set()
    if isinstance(sampler, NamedClasses) and isinstance(other, NamedClasses):
        ours, theirs = (
            {normal_form(name) for name in split.class_names} for split in (sampler, other)
        )
        names = ours & theirs
    if names:
        yield (
            f"splits must share no class, got {len(names)} in both, such as {min(names)!r}: "
            "split by class, and give every class a name of its own"
        )
    if allow_equal_examples:
        return
    other_tasks = [place.of(other) for place in _places(other, num_tasks)]

    def everything(tasks: list[Task]) -> set[bytes]:
        batches = [batch for task in tasks for batch in (task.support, task.query)]
        return {example for batch in batches for example in _examples(batch)}

    shared = everything(tasks) & everything(other_tasks)
    if shared:
        yield (
            f"splits must share no example, got {len(shared)} in tasks 0 .. {num_tasks - 1} of "
            "both: split by class, from a fixed file"
        )


def _digests(sampler: Any, places: list[_Place]) -> list[bytes]:
    return [_digest(place.of(sampler)) for place in places]


def _digests_there(pickled: bytes, places: list[_Place], threads: int) -> list[bytes]:
    torch.set_num_threads(threads)
    return _digests(pickle.loads(pickled), places)


def _digest(task: Task) -> bytes:
    """A hash of everything in a task except its id."""
    hasher = hashlib.sha256()
    for batch in (task.support, task.query):
        for tensor in (*batch.tensors, batch.index):
            hasher.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            hasher.update(_bytes(tensor))
    return hasher.digest()


def _differing(one: list[bytes], two: list[bytes]) -> int | None:
    pairs = enumerate(zip(one, two, strict=True))
    return next((index for index, (a, b) in pairs if a != b), None)


def _examples(batch: Batch) -> list[bytes]:
    """The bytes of each example, without an integer target: classes are numbered in each task."""
    labels = _classes_of(batch) if batch.names or len(batch.tensors) <= 2 else None
    tensors = [tensor for tensor in batch.tensors if tensor is not labels]
    columns = [[_bytes(example) for example in tensor] for tensor in tensors]
    return [b"".join(parts) for parts in zip(*columns, strict=True)]


def _bytes(tensor: Tensor) -> bytes:
    return as_bytes(tensor).numpy().tobytes()


def _classes_of(batch: Batch) -> Tensor | None:
    """The targets, where they are one integer an example."""
    labels = targets_of(batch)
    counted = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    is_class = labels is not None and labels.ndim == 1 and labels.dtype in counted
    return labels if is_class else None


def _n_way(task: Task) -> int | None:
    labels = _classes_of(task.support)
    return None if labels is None else len(labels.unique())


def _few(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:10]))
    return f"[{shown}]" if len(values) <= 10 else f"[{shown}, ...] ({len(values)} in all)"


def _all_tensors(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _random_states() -> dict[str, bytes]:
    return {
        "torch": _bytes(torch.get_rng_state()),
        "random": pickle.dumps(random.getstate()),
        "numpy": pickle.dumps(np.random.get_state()),  # noqa: NPY002  # only looked at
    }


def _first_of_each(violations: list[str]) -> list[str]:
    """One of those that differ in their task and values only."""
    firsts: dict[str, str] = {}
    for violation in violations:
        firsts.setdefault(violation.split(", got ")[0], violation)
    return list(firsts.values())


def _sizes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes)

"""`ImageStream`: images that come in small batches, task after task, and a memory of some.

Shape letters: n examples, C channels, H height, W width.

In this package the tasks that are learned one after the other are *stages*: to a Trainer the whole
stream is one task, whose data changes from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metadist.algorithm import split_own
from metadist.checks.values import require_integer, require_word
from metadist.problem import Problem
from metadist.task import Batch, Task
from metadist.tasks.continual.memory import MemoryKind, Reservoir, Ring
from metadist.tasks.data.random import Random
from metadist.tasks.fixed import metrics_on
from metadist.trees import Params


class Stage(NamedTuple):
    """The data of one stage.

    Args:
        pixels: uint8, (n, C, H, W), in the order in which they come.
        labels: int64, (n,).
        test_pixels, test_labels: The same, to judge on.
        order: int64, (C * H * W,): the pixel that is seen at each place; None: as they are.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test_pixels: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    order: NDArray[np.int64] | None = None


class ImageStream:
    """A stream: support is what a learner may train on at a step, query what it remembers apart.

    A stage brings `per_task` examples in batches, each for `updates` outer steps. The first example
    of a batch goes to the semantic memory of its stage, the others are new examples, and go to its
    episodic memory when the next batch comes. At a step

        support = the new examples, and from the second stage on min(held, replay) examples drawn
                  from the episodic memories of all stages, the present one included,
        query   = the semantic memories of all stages.

    The tensors of a batch are `inputs` float32 (n, C, H, W) in [0, 1], `stages` int64 (n,),
    `is_new` bool (n,), `slots` int64 (n,) and `targets` int64 (n,). The slot is that of a memory of
    `num_slots`: of a new example the one it will be stored in, of one of an earlier stage the one
    it is held in, else -1.

    Args:
        stages: The data; every stage has the same number of examples.
        batch: Examples that come together, >= 2, a divisor of their number.
        memory: Examples held of each stage, >= semantic.
        semantic: How many of these are held for the outer loss, >= 1.
        replay: The most examples that are replayed at a step, >= 0.
        updates: Outer steps on each batch, >= 1.
        kind: Both memories are a "ring", which holds the last ones, or a "reservoir", which holds
            a uniform choice.
        seed: The seed of what is replayed and held, 0 <= seed < 2^64.

    Source: the protocol of Pham et al., Contextual Transformation Networks for Online Continual
    Learning (ICLR 2021), and of BOME's experiment on it.
    """

    num_tasks = 1
    _described = ""

    def __init__(
        self,
        stages: Sequence[Stage],
        batch: int = 10,
        memory: int = 50,
        semantic: int = 10,
        replay: int = 64,
        updates: int = 2,
        kind: MemoryKind = "ring",
        seed: int = 0,
    ) -> None:
        require_stream(batch, memory, semantic, replay, updates, kind, seed)
        per_stage = len(stages[0].labels)
        if per_stage % batch:
            raise ValueError(f"batch must be a divisor of {per_stage} examples, got {batch}")
        self._stages = list(stages)
        self.batch, self.updates, self._replay, self._seed = batch, updates, replay, seed
        self._num_batches = per_stage // batch
        self._num_episodic, self._semantic_slots, self._kind = memory - semantic, semantic, kind
        numbers = np.arange(per_stage).reshape(self._num_batches, batch)
        self._kept_apart, self._new = numbers[:, 0], numbers[:, 1:].ravel()

        def hold(size: int, num_arrivals: int, name: str, stage: int) -> Ring | Reservoir:
            if kind == "ring":
                return Ring(size)
            return Reservoir(size, num_arrivals, Random(seed, name, stage))

        count = range(len(stages))
        self._semantic = [hold(semantic, self._num_batches, "semantic", k) for k in count]
        self._episodic = [hold(self._num_episodic, len(self._new), "episodic", k) for k in count]

    def __repr__(self) -> str:
        memories = f"{self._num_episodic}+{self._semantic_slots} slots a task, {self._kind}"
        return (
            f"{type(self).__name__}({self._described}; {self.num_stages} tasks, "
            f"batch={self.batch}, {memories}, replay={self._replay}, updates={self.updates}, "
            f"seed={self._seed})"
        )

    @property
    def num_stages(self) -> int:
        """How many tasks are learned one after the other."""
        return len(self._stages)

    @property
    def num_steps(self) -> int:
        """How many outer steps there are data for."""
        return self.num_stages * self.steps_per_stage

    @property
    def steps_per_stage(self) -> int:
        """How many outer steps a stage takes: stage k ends with step (k + 1) times as many."""
        return self._num_batches * self.updates

    @property
    def num_slots(self) -> int:
        """The slots of the episodic memory, that of all stages together."""
        return self.num_stages * self._num_episodic

    @property
    def num_classes(self) -> int:
        """How many classes a stage has."""
        return 1 + max(int(stage.labels.max()) for stage in self._stages)

    def sample(self, index: int) -> Task:
        """What the first step has."""
        return self.sample_at(index, 0)

    def sample_at(self, index: int, step: int) -> Task:
        """What the learner has at this step; its id is `index`."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step must be from 0 to {self.num_steps - 1}, got {step}")
        stage, within = divmod(step, self.steps_per_stage)
        batch = within // self.updates
        return Task(self._support(stage, batch, step), self._query(stage, batch), index)

    def test(self, stage: int) -> Batch:
        """The test examples of a stage."""
        data = self._stages[stage]
        inputs = _inputs(data.test_pixels, data.order)
        return _batch([(stage, inputs, data.test_labels, False, -1)])

    def accuracies(
        self, problem: Problem, outer: Params, inner: Params, num_stages: int | None = None
    ) -> list[float]:
        """The accuracy on the test examples of each of the first `num_stages`, by default all."""
        return [
            metrics_on(problem, split_own(outer)[0], inner, self.test(stage))["test_accuracy"]
            for stage in range(self.num_stages if num_stages is None else num_stages)
        ]

    def solution_metrics(self, problem: Problem, outer: Params, inner: Params) -> dict[str, float]:
        """The mean accuracy on the test examples of all stages, and that of the first and last."""
        found = self.accuracies(problem, outer, inner)
        return {
            "test_accuracy": float(np.mean(found)),
            "test_accuracy_first_task": found[0],
            "test_accuracy_last_task": found[-1],
        }

    def whole(self) -> Batch:
        """The training examples of all stages, what a learner has that need not go in turn."""
        return _batch(
            [
                (stage, _inputs(data.pixels, data.order), data.labels, True, -1)
                for stage, data in enumerate(self._stages)
            ]
        )

    def _support(self, stage: int, batch: int, step: int) -> Batch:
        width = self.batch - 1
        first = batch * width
        # Where the new examples will lie once all of them have arrived.
        held = self._episodic[stage].at(first + width)
        slots = np.full(width, -1)
        for slot in np.flatnonzero(held >= first).tolist():
            slots[held[slot] - first] = stage * self._num_episodic + slot
        parts = [self._part(stage, self._new[first : first + width], True, slots)]
        if stage:
            parts += self._replayed(stage, first, step)
        return _batch(parts)

    def _replayed(self, stage: int, num_arrivals: int, step: int) -> list[Part]:
        """A part for each stage, with what of its episodic memory is replayed."""
        counts = [len(self._new)] * stage + [num_arrivals]
        held = [memory.at(n) for memory, n in zip(self._episodic, counts, strict=False)]
        sizes = [len(of_stage) for of_stage in held]
        total = sum(sizes)
        chosen = Random(self._seed, "replay", step).choose(total, min(total, self._replay))
        ends = np.cumsum(sizes)
        order = np.sort(np.array(chosen, dtype=np.int64))
        parts = []
        for k, places in enumerate(np.split(order, np.searchsorted(order, ends[:-1]))):
            within = places - (ends[k] - sizes[k])
            slots = k * self._num_episodic + within if k < stage else np.full(len(within), -1)
            if len(within):
                parts.append(self._part(k, self._new[held[k][within]], False, slots))
        return parts

    def _query(self, stage: int, batch: int) -> Batch:
        counts = [self._num_batches] * stage + [batch + 1]
        return _batch(
            [
                self._part(k, self._kept_apart[memory.at(count)], False, -1)
                for k, (memory, count) in enumerate(zip(self._semantic, counts, strict=False))
            ]
        )

    def _part(
        self, stage: int, rows: NDArray[np.int64], is_new: bool, slots: NDArray[np.int64] | int
    ) -> Part:
        data = self._stages[stage]
        return stage, _inputs(data.pixels[rows], data.order), data.labels[rows], is_new, slots


Part = tuple[int, NDArray[np.uint8], NDArray[np.int64], bool, NDArray[np.int64] | int]
"""(stage, pixels, labels, whether they are new, slots) of examples of one stage."""


def _inputs(pixels: NDArray[np.uint8], order: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    if order is None:
        return pixels
    return pixels.reshape(len(pixels), -1)[:, order].reshape(pixels.shape)


def _batch(parts: Sequence[Part]) -> Batch:
    def column(position: int) -> Tensor:
        """A number for each example, of what is one for a part or has one for each."""
        rows = [np.broadcast_to(part[position], part[2].shape) for part in parts]
        return torch.from_numpy(np.concatenate(rows))

    return Batch.named(
        inputs=torch.from_numpy(np.concatenate([part[1] for part in parts])).float().div_(255),
        stages=column(0),
        is_new=column(3),
        slots=column(4),
        targets=column(2),
    )


def require_stream(
    batch: int, memory: int, semantic: int, replay: int, updates: int, kind: str, seed: int
) -> None:
    """Raise ValueError unless these are options of a stream; asked before data is read."""
    require_integer("batch", batch, 2)
    require_integer("semantic", semantic, 1)
    require_integer("memory", memory, semantic)
    require_integer("replay", replay, 0)
    require_integer("updates", updates, 1)
    require_word("seed", seed)
    if kind not in ("ring", "reservoir"):
        raise ValueError(f"kind must be 'ring' or 'reservoir', got {kind!r}")

"""Batches, tasks and stacks of tasks."""

import pytest
import torch

from metadist.task import Batch, Task, TaskSampler, shape_signature, stack_tasks, to_device
from tests.problems import QuadraticSampler, image_task, quadratic_task


def test_a_whole_set_is_indexed_from_zero():
    batch = Batch.of(torch.zeros(4, 2), torch.zeros(4))
    assert torch.equal(batch.index, torch.arange(4))


def test_a_batch_of_unequal_lengths_is_refused():
    with pytest.raises(ValueError, match=r"one length along axis 0, got \[\(4, 2\), \(3,\)\]"):
        Batch.of(torch.zeros(4, 2), torch.zeros(3))


def test_take_keeps_the_positions_in_the_full_set():
    batch = Batch.of(torch.arange(5) * 10, torch.arange(5) * 100)
    part = batch.take(torch.tensor([4, 1, 2]))
    assert part.tensors[0].tolist() == [40, 10, 20]
    assert part.tensors[1].tolist() == [400, 100, 200]
    assert part.index.tolist() == [4, 1, 2]
    assert part.take(torch.tensor([2, 0])).index.tolist() == [2, 4]


def test_a_stack_has_a_task_axis_in_front_of_every_tensor():
    tasks = [quadratic_task(index) for index in (3, 8, 5)]
    stacked = stack_tasks(tasks)
    assert torch.equal(torch.as_tensor(stacked.id), torch.tensor([3, 8, 5]))
    for b, task in enumerate(tasks):
        for many, one in ((stacked.support, task.support), (stacked.query, task.query)):
            assert torch.equal(many.index[b], one.index)
            for column, tensor in zip(many.tensors, one.tensors, strict=True):
                assert torch.equal(column[b], tensor)


@pytest.mark.parametrize(
    "sizes",
    [{"num_support": 2}, {"num_query": 5}, {"num_inner": 3}],
    ids=lambda sizes: next(iter(sizes)),
)
def test_tasks_of_unequal_shapes_do_not_stack(sizes):
    tasks = [quadratic_task(0), quadratic_task(1, **sizes)]
    assert shape_signature(tasks[0]) != shape_signature(tasks[1])
    with pytest.raises(
        ValueError, match=r"tasks of one stack must have equal shapes.*vectorize=False"
    ):
        stack_tasks(tasks)


def test_to_device_casts_floating_tensors_only():
    task = image_task(0)
    moved = to_device(task, "cpu", torch.float32)
    assert [tensor.dtype for tensor in moved.support.tensors] == [torch.float32, torch.int64]
    assert moved.query.index.dtype == torch.int64
    assert moved.id == task.id
    same = to_device(task, "cpu")
    assert [tensor.dtype for tensor in same.query.tensors] == [torch.float64, torch.int64]
    assert isinstance(moved, Task)


def test_to_device_moves_every_tensor():
    moved = to_device(quadratic_task(0), "meta")
    for batch in (moved.support, moved.query):
        assert {tensor.device.type for tensor in (*batch.tensors, batch.index)} == {"meta"}


def test_a_sampler_is_anything_with_sample():
    assert isinstance(QuadraticSampler(), TaskSampler)
    assert not isinstance(object(), TaskSampler)

"""Batches, tasks and stacks of tasks."""

import pickle

import pytest
import torch

from metadist.sampler import TaskSampler
from metadist.task import Batch, Task, shape_signature, stack_tasks, targets_of, to_device
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


def named(count: int = 4) -> Batch:
    x, y = torch.arange(2.0 * count).reshape(count, 2), torch.arange(count)
    return Batch.named(targets=y, mask=x > 1, inputs=x)


def test_fields_come_by_name_whatever_their_order():
    batch = named().take(torch.tensor([2, 1]))
    inputs, targets, mask = batch.fields("inputs", "targets", "mask")
    assert inputs.tolist() == [[4.0, 5.0], [2.0, 3.0]]
    assert targets.tolist() == [2, 1]
    assert mask.all() and batch.index.tolist() == [2, 1]
    plain = Batch.of(torch.zeros(3), torch.ones(3))
    assert [float(t[0]) for t in plain.fields("inputs", "targets")] == [0, 1]
    assert [float(t[0]) for t in plain.fields("targets", "inputs")] == [0, 1]


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (named(), "got targets, mask, inputs"),
        (Batch.of(*[torch.zeros(2)] * 3), "got 3 without names"),
        (Batch.of(torch.zeros(2)), "got 1 without names"),
        (Batch.named(x=torch.zeros(2), y=torch.zeros(2)), "got x, y"),
    ],
)
def test_a_guess_which_tensor_is_which_is_refused(batch, got):
    with pytest.raises(ValueError, match=rf"must be inputs, targets, {got}: build it with Batch"):
        batch.fields("inputs", "targets")


def test_targets_are_those_named_so_or_the_second_of_two():
    zero, one = torch.zeros(3), torch.ones(3)
    targets = targets_of(named())
    assert targets is not None and targets.tolist() == [0, 1, 2, 3]
    assert targets_of(Batch.of(zero, one)) is one
    assert targets_of(Batch.named(inputs=zero, weights=one)) is None
    assert targets_of(Batch.of(zero)) is None
    with pytest.raises(ValueError, match="must be named in a batch of more than two tensors, got"):
        targets_of(Batch.of(zero, one, one))


def test_names_go_wherever_a_batch_goes():
    task = to_device(Task(named(), named(3), 5), "cpu", torch.float64)
    assert task.support.fields("inputs", "mask", "targets")[0].dtype == torch.float64
    task = pickle.loads(pickle.dumps(task))
    stacked = stack_tasks([task, task])
    assert list(stacked.query.names) == ["targets", "mask", "inputs"]

    def total(task: Task) -> torch.Tensor:
        inputs, _, targets = task.support.fields("inputs", "mask", "targets")
        return inputs.sum() + 100 * targets.sum()

    assert torch.func.vmap(total)(stacked).tolist() == [628, 628]
    other = Task(named(), named(3)._replace(names={}), 5)
    with pytest.raises(ValueError, match="tasks of one stack must have the same names"):
        stack_tasks([task, other])


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

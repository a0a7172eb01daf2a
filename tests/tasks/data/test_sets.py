"""Sets of examples from arrays, data sets and loaders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from metadist import Batch
from metadist.tasks import LinearClassifier, LossWeighting, OneTask, check_sampler
from metadist.tasks.data.sets import batch_of
from tests.tasks.helpers import Endless, refusal

INPUTS = torch.arange(12.0).reshape(6, 2)
TARGETS = torch.tensor([0, 1, 0, 1, 0, 1])
DATASET = TensorDataset(INPUTS, TARGETS)


@pytest.mark.parametrize(
    "data",
    [
        Batch.of(INPUTS, TARGETS),
        (INPUTS, TARGETS),
        (INPUTS.double().numpy(), TARGETS.numpy()),
        DATASET,
        [(INPUTS[i].numpy(), i % 2) for i in range(6)],
        DataLoader(DATASET, batch_size=4, shuffle=True, drop_last=True),
        DataLoader(DATASET, batch_size=None),
    ],
)
def test_every_form_gives_the_same_batch(data: Any):
    batch = batch_of(data, "support")
    assert torch.equal(batch.tensors[0], INPUTS) and batch.tensors[0].dtype == torch.float32
    assert torch.equal(batch.tensors[1], TARGETS)
    assert batch.index.tolist() == list(range(6))


def test_a_mapping_gives_names():
    batch = batch_of({"inputs": INPUTS, "mask": TARGETS, "targets": TARGETS}, "support")
    assert list(batch.names) == ["inputs", "mask", "targets"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "query must have its examples by position (__len__ and __getitem__), got the"),
        (DataLoader(Endless()), "got the iterable Endless: tasks are drawn in any order, and"),
        (
            DataLoader(DATASET, sampler=SubsetRandomSampler([0, 1])),
            "query must be a DataLoader over the whole of its data set, got one with "
            "SubsetRandomSampler: pass the data set, or torch.utils.data.Subset(",
        ),
        (
            DataLoader(DATASET, batch_sampler=[[0, 1], [2, 3]]),
            "query must be a DataLoader over the whole of its data set, got one with list: ",
        ),
        (
            DataLoader(DATASET, collate_fn=len),
            "query must be a DataLoader with torch's own collate_fn, got len: do what it does",
        ),
        (INPUTS, "query must be (inputs, targets), a data set or a DataLoader, got Tensor: give"),
        ([], "query must hold an example, got an empty list"),
        ([1, 2, 3], "query must give (input, target) at each position, got int: wrap the data"),
        (
            [(torch.zeros(2), 0), (torch.zeros(3), 1)],
            "query must give tensors, arrays or numbers of one shape at each position, got stack",
        ),
        ([(object(), 0)], "convert them in the data set (of torchvision's, transform=ToTensor())"),
        ({"inputs": ["a"]}, "query must be arrays of numbers, got "),
        ((INPUTS, ["ant", "bee"] * 3), "number classes that are texts (numpy.unique(labels, retu"),
    ],
)
def test_what_cannot_be_a_set_is_refused(data: Any, message: str):
    assert message in refusal(lambda: OneTask((INPUTS, TARGETS), data))


def test_one_task_is_judged_on_its_test_data():
    data = OneTask(DATASET, (INPUTS, TARGETS), test=(np.ones((3, 2)), np.array([0, 0, 1])))
    check_sampler(data, processes=False, allow_equal_examples=True)
    problem = LossWeighting(model=LinearClassifier(2, 2))
    outer = problem.init_outer(torch.Generator())
    inner = problem.init_inner(outer, data.sample(0))
    metrics = data.solution_metrics(problem, outer, inner)  # logits are zero: class 0
    assert metrics["test_accuracy"] == pytest.approx(2 / 3)
    assert metrics["test_loss"] == pytest.approx(np.log(2))
    assert not OneTask(DATASET, DATASET).solution_metrics(problem, outer, inner)


def test_named_sets_are_brought_into_the_order_of_the_support_set():
    swapped = {"targets": TARGETS, "inputs": INPUTS}
    data = OneTask({"inputs": INPUTS, "targets": TARGETS}, swapped, test=swapped)
    assert data.test_set is not None
    for batch in (data.query, data.test_set):
        assert list(batch.names) == ["inputs", "targets"]
        assert torch.equal(batch.tensors[0], INPUTS) and torch.equal(batch.tensors[1], TARGETS)
    message = "query must have the names of support (targets, inputs), got "
    other = {"x": INPUTS, "targets": TARGETS}
    assert message + "x, targets: rename" in refusal(lambda: OneTask(swapped, other))
    assert message + "no names: rename" in refusal(lambda: OneTask(swapped, DATASET))


@pytest.mark.parametrize("dtype", ["int32", "int16", "uint16", "bool"])
def test_targets_are_int64_and_inputs_stay(dtype: str):
    targets = TARGETS.numpy().astype(dtype)
    rows = [(np.array([3], "uint8"), target) for target in targets]
    for batch in (
        batch_of((np.zeros((6, 1), "uint8"), targets), "support"),
        batch_of({"inputs": np.zeros((6, 1), "uint8"), "targets": targets}, "support"),
        batch_of(rows, "support"),
    ):
        assert batch.tensors[0].dtype == torch.uint8
        assert batch.tensors[1].dtype == torch.int64 and torch.equal(batch.tensors[1], TARGETS)


def test_one_task_keeps_what_it_was_given():
    array, tensor = INPUTS.numpy().copy(), TARGETS.clone()
    data = OneTask((array[::-1], tensor), Batch.of(torch.from_numpy(array), tensor))
    array[:] = 0
    tensor[:] = 0
    assert torch.equal(data.support.tensors[0], INPUTS.flip(0))
    assert torch.equal(data.query.tensors[0], INPUTS)
    assert torch.equal(data.support.tensors[1], TARGETS)


def test_an_empty_set_is_refused():
    message = "query must hold an example, got none: check how"
    assert message in refusal(lambda: OneTask(DATASET, (INPUTS[:0], TARGETS[:0])))


def test_targets_may_be_a_list():
    expected = OneTask((INPUTS, TARGETS), (INPUTS, TARGETS)).sample(0)
    found = OneTask((INPUTS, TARGETS.tolist()), (INPUTS, TARGETS)).sample(0)
    assert torch.equal(found.support.tensors[1], expected.support.tensors[1])

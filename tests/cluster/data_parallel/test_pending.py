"""Values that are known after a round: what can be done with them, and how many rounds it takes."""

from __future__ import annotations

import pytest
import torch

from metadist.cluster.data_parallel.pending import Pending, Question, Rounds, known
from metadist.trees import add, dot, norm

X = {"x": torch.tensor([1.0, 2.0, 3.0])}


class Doubler:
    """Answers every question with twice its tree, and remembers the rounds."""

    def __init__(self):
        self.asked = []
        self.rounds = Rounds(self.exchange)

    def exchange(self, number, questions):
        assert number == len(self.asked)
        self.asked.append([question.method for question in questions])
        return [({"x": 2 * question.trees[0]["x"]},) for question in questions]

    def ask(self, tree, method="double"):
        return self.rounds.ask(Question(method, None, (tree,)), (tree,))[0]


@pytest.fixture
def doubler():
    return Doubler()


def test_what_does_not_wait_for_one_another_shares_a_round(doubler):
    first, second = doubler.ask(X, "first"), doubler.ask(X, "second")
    deeper = doubler.ask(add(first, X), "deeper")
    beside = doubler.ask(X, "beside")
    assert doubler.asked == []
    total = float((deeper["x"] + second["x"] + beside["x"]).sum())
    assert doubler.asked == [["first", "second", "beside"], ["deeper"]]
    assert total == float((6 * X["x"] + 4 * X["x"]).sum())
    assert doubler.rounds.num_rounds == 2


def test_a_question_after_a_round_is_of_the_next(doubler):
    first = doubler.ask(X)
    assert float(first["x"][0]) == 2.0
    again = doubler.ask(first)
    assert float(again["x"][0]) == 4.0
    assert doubler.rounds.num_rounds == 2


def test_form_is_known_without_a_round(doubler):
    pending = doubler.ask(X)["x"]
    matrix = pending[:, None] * pending
    assert matrix.shape == (3, 3) and matrix.dtype == torch.float32
    assert (len(matrix), matrix.ndim, matrix.numel(), matrix.dim()) == (3, 2, 9, 2)
    assert matrix.device.type == "cpu" and matrix.is_floating_point() and not matrix.requires_grad
    assert type(matrix) is Pending and doubler.asked == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: float(x.sum()),
        lambda x: bool(x[0] > 1),
        lambda x: x.tolist(),
        lambda x: x.numpy().tolist(),
        lambda x: [float(part) for part in x],
        lambda x: [part.tolist() for part in x.split([1, 2])],
        lambda x: x[x > 2].tolist(),
        lambda x: torch.linalg.eigh(x[:, None] * x).eigenvalues.tolist(),
        lambda x: repr(x),
        lambda x: int(x.argmax()),
        lambda x: torch.cat([x, torch.ones(1), 2 * x]).tolist(),
        lambda x: torch.where(x > 2, x, torch.zeros_like(x)).relu().tolist(),
        lambda x: float(dot({"a": x}, {"a": x}) + norm({"a": x})),
        lambda x: torch.stack([x, x]).mT.tolist(),
        lambda x: torch.tensordot(x.new_tensor([1.0, 2.0, 3.0]), x, dims=1).item(),
        lambda x: (3 - x / 2).tolist(),
    ],
)
def test_it_computes_as_a_tensor_does(doubler, function):
    assert function(doubler.ask(X)["x"]) == function(2 * X["x"])
    assert len(doubler.asked) == 1


def test_known_puts_values_everywhere(doubler):
    pending = doubler.ask(X)
    node = known({"a": (pending, [pending["x"] + 1, 3])})
    assert type(node["a"][0]["x"]) is torch.Tensor and node["a"][1][1] == 3
    assert torch.equal(node["a"][1][0], 2 * X["x"] + 1)


def test_a_wrong_shape_is_told_where_it_is_used(doubler):
    pending = doubler.ask(X)["x"]
    with pytest.raises(RuntimeError, match="size of tensor a"):
        pending + torch.ones(4)


def test_chains_may_be_longer_than_the_stack(doubler):
    total = doubler.ask(X)
    for _ in range(3000):
        total = add(total, X)
    assert torch.equal(known(total)["x"], 3002 * X["x"])


def test_a_function_of_ones_own_waits_too(doubler):
    pending = doubler.ask(X)
    later = doubler.rounds.later(lambda tree, c: {"x": tree["x"].numpy() + c}, (pending, 1.0), X)
    assert type(later["x"]) is Pending and doubler.asked == []
    assert torch.equal(torch.as_tensor(later["x"].settled()), 2 * X["x"] + 1)
    at_once = doubler.rounds.later(lambda tree: tree["x"], (pending,), X["x"])
    assert type(at_once) is torch.Tensor

"""Heads in closed form, against their formulas and plain autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metadist import Trainer, check_hypergradient, export, predict, task_hypergradients
from metadist.algorithms import ITD
from metadist.compute import Compute
from metadist.models import Conv4
from metadist.task import to_device
from metadist.tasks import (
    FewShotProblem,
    FixedTasks,
    Glyphs,
    LinearProbe,
    NearestCentroid,
    ProtoNet,
    RidgeHead,
)
from metadist.trees import leaves
from tests.problems import DOUBLE, generator, image_task
from tests.tasks.helpers import refusal

STEP = ITD(inner_steps=1, inner_lr=1e-7)


def conv4(batch_norm="transductive"):
    torch.manual_seed(0)
    return Conv4(n_way=3, width=4, image_size=16, batch_norm=batch_norm)


def outer_of(problem):
    return {n: leaf.to(DOUBLE) for n, leaf in problem.init_outer(generator(0)).items()}


def body_of(model, outer):
    model = model.to(DOUBLE)
    names = {f"features.{name}": name for name, _ in model.features.named_parameters()}
    weights = {local: outer[name] for name, local in names.items()}
    return lambda x: torch.func.functional_call(model.features, weights, (x,))


def proto_net_loss(model, outer, task):
    """Minus the log of softmax of negative squared distances to class means."""
    (x, y), (u, v) = task.support.tensors, task.query.tensors
    body = body_of(model, outer)
    features = body(x)
    means = torch.stack([features[y == c].mean(0) for c in range(int(y.max()) + 1)])
    return F.cross_entropy(-torch.cdist(body(u), means).square(), v)


def ridge_loss(model, outer, task):
    (x, y), (u, v) = task.support.tensors, task.query.tensors
    body = body_of(model, outer)
    features = body(x)
    targets = F.one_hot(y).to(DOUBLE)
    gram = features.T @ features + outer["ridge.log_strength"].exp() * torch.eye(
        features.shape[1], dtype=DOUBLE
    )
    weight = torch.linalg.inv(gram) @ features.T @ targets  # the other form of the solution
    return F.cross_entropy(outer["ridge.scale"] * body(u) @ weight + outer["ridge.offset"], v)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda model: FewShotProblem(model, "head", head_start="prototypes"), proto_net_loss),
        (ProtoNet, proto_net_loss),
        (RidgeHead, ridge_loss),
    ],
    ids=["tiny inner rate", "proto net", "ridge"],
)
def test_loss_and_hypergradient_are_those_of_the_closed_form(make, loss, vectorize):
    problem = make(conv4())
    outer = outer_of(problem)
    tasks = [image_task(i, n_way=3) for i in range(2)]
    x = leaves(outer)
    expected = sum(loss(conv4(), x, task) for task in tasks)
    slopes = torch.autograd.grad(expected, [*x.values()])
    found = task_hypergradients(
        problem, STEP, outer, tasks, report=True, compute=Compute(vectorize=vectorize)
    )
    tolerance = 1e-5 if type(problem) is FewShotProblem else 1e-9
    assert found.metrics["query_loss"] == pytest.approx(float(expected.detach()), rel=tolerance)
    for (name, leaf), slope in zip(found.total.items(), slopes, strict=True):
        torch.testing.assert_close(leaf, slope, rtol=20 * tolerance, atol=tolerance, msg=name)


def test_proto_maml_has_the_hypergradient_of_its_unrolled_loop():
    problem = FewShotProblem(conv4("inductive"), "head", head_start="prototypes")
    tasks = FixedTasks([image_task(0, n_way=3)])
    algorithm = ITD(inner_steps=3, inner_lr=0.05)
    report = check_hypergradient(problem, tasks, algorithm)
    assert report.error < 1e-6


def test_training_and_test_may_have_other_numbers_of_classes():
    problem = FewShotProblem(Conv4(width=8), "head", head_start="prototypes")
    algorithm = ITD(inner_steps=2, inner_lr=0.1)
    trainer = Trainer(
        problem, Glyphs(n_way=3, k_query=3), algorithm, meta_batch_size=2, seed=0, quiet=True
    )
    trainer.fit(2)
    assert "head.weight" not in trainer.outer
    result = trainer.test(Glyphs(n_way=7, k_query=3, split="test"), 4)
    assert result.metrics["query_accuracy"].mean > 1 / 7
    task = Glyphs(n_way=7, k_query=3, split="test").sample(0)
    module = trainer.export(task)
    assert module.get_submodule("head").extra_repr() == "in_features=8, out_features=7, bias=True"
    torch.testing.assert_close(module(task.query.tensors[0]), trainer.predict(task))


def probe_loss(task, steps, lr):
    """The query loss, as a function of the log of the decay, by gradient steps written out."""
    (x, y), (u, v) = task.support.tensors, task.query.tensors
    body = conv4().to(DOUBLE).features
    features, queries = body(x).detach(), body(u).detach()

    def loss(log_decay):
        weight = torch.zeros(3, features.shape[1], dtype=DOUBLE, requires_grad=True)
        bias = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
        for _ in range(steps):
            fit = F.cross_entropy(features @ weight.T + bias, y)
            size = weight.square().sum() + bias.square().sum()
            slopes = torch.autograd.grad(
                fit + log_decay.exp() / 2 * size, (weight, bias), create_graph=True
            )
            weight, bias = weight - lr * slopes[0], bias - lr * slopes[1]
        return F.cross_entropy(queries @ weight.T + bias, v)

    return loss


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_linear_probe_is_logistic_regression_on_frozen_features(vectorize):
    problem = LinearProbe(conv4().to(DOUBLE), decay=0.1)
    outer = outer_of(problem)
    tasks = [image_task(i, n_way=3) for i in range(2)]
    x = outer["frozen.log_decay"].clone().requires_grad_()
    expected = sum(probe_loss(task, 3, 0.4)(x) for task in tasks)
    (slope,) = torch.autograd.grad(expected, x)
    algorithm = ITD(inner_steps=3, inner_lr=0.4)
    compute = Compute(vectorize=vectorize)
    found = task_hypergradients(problem, algorithm, outer, tasks, report=True, compute=compute)
    assert found.metrics["query_loss"] == pytest.approx(float(expected.detach()), rel=1e-9)
    torch.testing.assert_close(found.total["frozen.log_decay"], slope, rtol=1e-7, atol=1e-12)


def test_a_nearest_centroid_is_a_proto_net_whose_features_stay():
    model = conv4()
    problem, task = NearestCentroid(model), image_task(0, n_way=3)
    outer = outer_of(problem)
    assert list(outer) == ["frozen.log_scale"]
    proto_net = ProtoNet(model)
    task = to_device(task, "cpu", torch.float32)
    start = proto_net.init_outer(generator(0))
    torch.testing.assert_close(
        predict(problem, STEP, problem.init_outer(generator(0)), task),
        predict(proto_net, STEP, start, task),
    )
    assert all(leaf.requires_grad for leaf in model.parameters())  # a copy is frozen
    trainer = Trainer(problem, FixedTasks([task] * 2), STEP, keep_state=False, quiet=True)
    trainer.fit(2)
    assert trainer.outer["frozen.log_scale"] != 0


@pytest.mark.parametrize("kind", [ProtoNet, RidgeHead, NearestCentroid, LinearProbe])
def test_a_closed_form_is_predicted_and_exported(kind):
    problem = kind(conv4("inductive"))
    outer = problem.init_outer(generator(0))
    task = to_device(image_task(1, n_way=5), "cpu", torch.float32)
    logits = predict(problem, STEP, outer, task)
    assert logits.shape == (10, 5)
    torch.testing.assert_close(export(problem, STEP, outer, task)(task.query.tensors[0]), logits)


@pytest.mark.parametrize("kind", [NearestCentroid, LinearProbe])
def test_a_model_that_is_frozen_already_is_taken(kind):
    model = conv4()
    task = to_device(image_task(1, n_way=5), "cpu", torch.float32)
    expected, found = (
        predict(problem, STEP, problem.init_outer(generator(0)), task)
        for problem in (kind(model), kind(model.requires_grad_(False)))
    )
    assert torch.equal(found, expected)
    assert not any(leaf.requires_grad for leaf in model.parameters())


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.body = nn.Linear(256, 8)

    def forward(self, x):
        return self.head(self.body(x.flatten(1)))


def test_where_there_are_no_prototypes_is_said():
    def made(model, **options):
        return FewShotProblem(model, head_start="prototypes", **options)

    assert "needs adapt='head'" in refusal(lambda: made(conv4()))
    assert "needs adapt='head' and loss='cross_entropy'" in refusal(
        lambda: made(conv4(), adapt="head", loss="mse")
    )
    no_bias = nn.Sequential(nn.Flatten(), nn.Linear(256, 3, bias=False))
    assert "nn.Linear with a trainable weight and bias" in refusal(
        lambda: made(no_bias, adapt="head")
    )
    problem = made(HeadFirst(), adapt="head")
    task = to_device(image_task(0, n_way=3), "cpu", torch.float32)
    outer = problem.init_outer(generator(0))
    assert "'head' runs last and 'body' is registered last" in refusal(
        lambda: problem.encode(outer, task)
    )
    word: Any = "means"
    message = refusal(lambda: FewShotProblem(conv4(), "head", head_start=word))
    assert "must be 'learned' or 'prototypes'" in message

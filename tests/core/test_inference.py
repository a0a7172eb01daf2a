"""Adapting, predicting and exporting, against `evaluate`, by hand and against each other."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from metadist import Batch, Task, Trainer, adapt, export, predict
from metadist.algorithms import ITD, LancBiO, MetaSGD
from metadist.evaluation import evaluate_tasks
from metadist.models import MLP, Conv4, ResNet12, with_task_batch_norm
from metadist.task import to_device
from metadist.tasks import (
    FewShotProblem,
    FixedTasks,
    HyperCleaning,
    LinearClassifier,
    LossWeighting,
    ProtoNet,
    QuadraticData,
    Quadratics,
)
from tests.helpers import Images, curves
from tests.problems import generator, image_task
from tests.tasks.helpers import refusal

ADAPTATION = ITD(inner_steps=3, inner_lr=0.1)


def conv4(batch_norm="transductive"):
    return Conv4(n_way=3, width=4, image_size=16, batch_norm=batch_norm)


def weight_normed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    return model


def tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.append(nn.Linear(8, 3))
    model[3].weight = model[2].weight
    return model


def own_batch_norm():
    """Of torch's own layers, running statistics and parameters frozen in part."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)
    )
    model(torch.randn(8, 1, 16, 16))
    model[1].eval()
    model[0].weight.requires_grad_(False)
    return model


def flat_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    return with_task_batch_norm(model, "inductive")


MODELS = {
    "transductive": conv4,
    "inductive": lambda: conv4("inductive"),
    "none": lambda: conv4("none"),
    "resnet": lambda: ResNet12(3, 1, widths=(2, 2, 2, 2), image_size=16, batch_norm="inductive"),
    "weight norm": weight_normed,
    "tied": tied,
    "own batch norm": own_batch_norm,
    "flat": flat_norm,
}


def pictures(index):
    return to_device(image_task(index), "cpu", torch.float32)


def start_of(problem):
    return problem.init_outer(generator(0))


@pytest.mark.parametrize("adapted", ["all", "head"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_an_exported_module_gives_what_predict_gives_and_is_of_torch_alone(model, adapted):
    torch.manual_seed(0)
    problem = FewShotProblem(model(), adapt=adapted)
    outer = start_of(problem)
    task = pictures(3)
    logits = predict(problem, ADAPTATION, outer, task)
    module = export(problem, ADAPTATION, outer, task)
    inputs, targets = task.query.tensors
    torch.testing.assert_close(module(inputs), logits, rtol=1e-4, atol=1e-5)
    measured = evaluate_tasks(problem, FixedTasks([task._replace(id=0)]), ADAPTATION, outer, 1)
    assert float(nn.functional.cross_entropy(logits, targets)) == pytest.approx(
        measured["query_loss"][0], rel=1e-5
    )
    foreign = {type(layer) for layer in module.modules() if "metadist" in type(layer).__module__}
    assert {cls.__module__ for cls in foreign} <= {"metadist.models"}
    assert {cls.__name__ for cls in foreign} <= {"Conv4", "ResNet12", "ResidualBlock"}
    assert not any(map(nn.utils.parametrize.is_parametrized, module.modules()))
    # The problem is as it was.
    assert torch.equal(predict(problem, ADAPTATION, outer, task), logits)
    again = pickle.loads(pickle.dumps(module))
    again.load_state_dict(copy.deepcopy(module).state_dict())
    assert torch.equal(again(inputs), module(inputs))


def test_an_exported_module_of_torch_layers_is_read_where_metadist_is_not(tmp_path):
    problem = FewShotProblem(flat_norm(), adapt="all")
    task = pictures(0)
    module = export(problem, ADAPTATION, start_of(problem), task)
    torch.save((module, task.query.tensors[0], module(task.query.tensors[0])), tmp_path / "m.pt")
    program = (
        "import sys, torch; sys.modules['metadist'] = None\n"
        "module, x, y = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.allclose(module(x), y)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "m.pt"], cwd=tmp_path, capture_output=True
    )
    assert not found.returncode, found.stderr.decode()


def test_adaptation_is_gradient_descent_on_the_support_set_alone():
    problem = FewShotProblem(MLP(1, 1, (4,)), loss="mse")
    outer = {name: leaf.double() for name, leaf in start_of(problem).items()}
    task = curves().sample(0)
    x, y = (tensor.double() for tensor in task.support.tensors)
    expected = {name: leaf.clone() for name, leaf in outer.items()}
    for _ in range(2):
        for leaf in expected.values():
            leaf.requires_grad_()
        hidden = torch.relu(x @ expected["features.0.weight"].T + expected["features.0.bias"])
        out = hidden @ expected["head.weight"].T + expected["head.bias"]
        slopes = torch.autograd.grad(((out - y) ** 2).mean(), [*expected.values()])
        expected = {
            name: (leaf - 0.1 * slope).detach()
            for (name, leaf), slope in zip(expected.items(), slopes, strict=True)
        }
    found = adapt(problem, ADAPTATION, outer, task.support, inner_steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    spoiled = task._replace(query=task.query.map(lambda tensor: tensor * torch.nan))
    torch.testing.assert_close(
        adapt(problem, ADAPTATION, outer, spoiled, inner_steps=2), found, rtol=0, atol=0
    )


def test_the_algorithms_own_variables_are_used_and_do_not_get_into_the_module():
    problem = FewShotProblem(MLP(1, 1, (4,)), loss="mse")
    algorithm = MetaSGD(inner_steps=2)
    trainer = Trainer(problem, curves(), algorithm, meta_batch_size=2, quiet=True)
    trainer.fit(2)
    task = curves("test").sample(5)
    module = trainer.export(task)
    torch.testing.assert_close(module(task.query.tensors[0]), trainer.predict(task))
    assert {name for name, _ in module.named_parameters()} == set(problem.init_outer(generator(0)))


def test_a_support_set_and_inputs_are_enough():
    problem = FewShotProblem(conv4("inductive"), adapt="head")
    outer = start_of(problem)
    task = pictures(0)
    whole = predict(problem, ADAPTATION, outer, task)
    inputs = task.query.tensors[0]
    parts = predict(problem, ADAPTATION, outer, task.support, inputs)
    assert torch.equal(whole, parts)
    one = predict(problem, ADAPTATION, outer, task.support, inputs[4:5])
    torch.testing.assert_close(one, whole[4:5])


def test_the_trainer_takes_its_own_steps_of_evaluation_and_the_states_it_keeps():
    problem = FewShotProblem(conv4(), adapt="head")
    images = Images()
    trainer = Trainer(
        problem, images, ADAPTATION, meta_batch_size=2, eval_inner_steps=7, quiet=True
    )
    task = images.sample(9)
    expected = adapt(problem, ADAPTATION, trainer.outer, task, inner_steps=7)
    torch.testing.assert_close(trainer.adapt(task), expected)

    random = generator(1)
    sets = [Batch.of(torch.randn(12, 4, generator=random), torch.arange(12) % 3) for _ in range(2)]
    tasks = FixedTasks([Task(sets[0], sets[1], 0)])
    cleaning = HyperCleaning(12, LinearClassifier(4, 3))
    trainer = Trainer(cleaning, tasks, LancBiO(inner_steps=2, inner_lr=0.1), quiet=True)
    trainer.fit(10)
    task = tasks.sample(0)
    weight, bias = trainer.inner(0)["head.weight"], trainer.inner(0)["head.bias"]
    logits = task.query.tensors[0] @ weight.T + bias
    torch.testing.assert_close(trainer.predict(task), logits)
    torch.testing.assert_close(trainer.export(task)(task.query.tensors[0]), logits)
    other = task._replace(support=task.support.map(lambda tensor: tensor.flip(0)))
    fresh = adapt(cleaning, trainer.algorithm, trainer.outer, other)
    torch.testing.assert_close(trainer.adapt(other), fresh)
    assert not torch.equal(fresh["head.weight"], weight)


def test_every_problem_that_weights_examples_exports_its_model():
    random = generator(2)
    sets = [Batch.of(torch.randn(9, 4, generator=random), torch.arange(9) % 3) for _ in range(2)]
    problem = LossWeighting(model=LinearClassifier(4, 3))
    module = export(problem, ADAPTATION, start_of(problem), Task(sets[0], sets[1], 0))
    found = predict(problem, ADAPTATION, start_of(problem), Task(sets[0], sets[1], 0))
    torch.testing.assert_close(module(sets[1].tensors[0]), found)


class Peeping(ITD):
    """Adapts on the query set."""

    def adapt(self, oracle, context, inner):
        oracle.outer_grads(context, inner, oracle.draw_outer())
        return inner


class InTraining(nn.Module):
    """Computes something else in eval mode."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(256, 3)

    def forward(self, x):
        return self.head(x.flatten(1)) * (2.0 if self.training else 1.0)


def test_what_cannot_be_predicted_or_exported_is_refused():
    data = QuadraticData()
    problem = Quadratics()
    message = refusal(lambda: export(problem, ADAPTATION, start_of(problem), data.sample(0)))
    assert "problem must have a model" in message and "Quadratics" in message
    few_shot = FewShotProblem(conv4())
    outer = start_of(few_shot)
    task = pictures(0)
    assert "adapt on the support set alone" in refusal(
        lambda: predict(few_shot, Peeping(), outer, task)
    )
    other = FewShotProblem(InTraining())
    assert "eval mode" in refusal(lambda: export(other, ADAPTATION, start_of(other), task))
    with pytest.raises(FloatingPointError, match="smaller inner_lr"):
        adapt(few_shot, dataclasses.replace(ADAPTATION, inner_lr=1e38), outer, task)
    assert "inputs must be examples of the shapes [(1, 16, 16), ()]" in refusal(
        lambda: predict(few_shot, ADAPTATION, outer, task, torch.zeros(2, 1, 40, 40))
    )
    gap = task._replace(support=task.support.take((task.support.tensors[1] != 1).nonzero()[:, 0]))
    prototypes = ProtoNet(conv4())
    assert "an example of each class 0 .. 2, got none of 1" in refusal(
        lambda: predict(prototypes, ADAPTATION, start_of(prototypes), gap)
    )
    named = Batch.named(inputs=torch.zeros(3, 2), mask=torch.zeros(3), targets=torch.zeros(3))
    assert "inputs must be a Batch" in refusal(
        lambda: predict(few_shot, ADAPTATION, outer, named, torch.zeros(3, 2))
    )

"""Reptile: its formula, its first step, its costs, and where it cannot be used."""

import pytest
import torch

from metadist.algorithms import Reptile
from metadist.compute import Compute
from metadist.executor import LocalExecutor
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP, Conv4
from metadist.optimizer import OuterOptimizer
from metadist.outer import OuterVariable
from metadist.step_rules import SGD
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.trees import add, scale, sub
from metadist.workload import Workload
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    generator,
    image_task,
    oracle_of,
    plain_gradient,
    quadratic_task,
    smooth_task,
    vector_task,
)


def maml_on_perceptron():
    torch.manual_seed(0)
    return FewShotProblem(MLP(3, 2, (4,)).double(), adapt="all", loss="mse")


def conv4(adapt, batch_norm="transductive"):
    model = Conv4(n_way=3, width=3, image_size=16, batch_norm=batch_norm).double()
    return FewShotProblem(model, adapt=adapt)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_hypergradient_is_start_minus_end_of_adaptation(momentum):
    problem, tasks = maml_on_perceptron(), [vector_task(index) for index in range(2)]
    outer = problem.init_outer(generator(0))
    algorithm = Reptile(inner_steps=3, inner_optimizer=SGD(0.2, momentum=momentum))
    expected = scale(outer, 0.0)
    for task in tasks:
        leaves = {name: torch.nn.Parameter(leaf.clone()) for name, leaf in outer.items()}
        reference = torch.optim.SGD(leaves.values(), lr=0.2, momentum=momentum)
        for _ in range(3):
            reference.zero_grad()
            problem.inner_loss({}, leaves, task.support).backward()
            reference.step()
        end = {name: leaf.detach() for name, leaf in leaves.items()}
        expected = add(expected, sub(outer, end))
    for vectorize in (False, True):
        result = task_hypergradients(
            problem, algorithm, outer, tasks, compute=Compute(vectorize=vectorize)
        )
        assert_close(result.total, expected, 1e-13)


def test_one_inner_step_is_sgd_on_the_joint_loss():
    class Sampler:
        def sample(self, index):
            return vector_task(index)

    problem = maml_on_perceptron()
    outer = problem.init_outer(generator(0))
    optimizer = OuterOptimizer("sgd", lr=0.5)
    executor = LocalExecutor()
    work = Workload(problem, Sampler(), Reptile(inner_steps=1, inner_lr=0.2), meta_batch_size=4)
    executor.start(work, optimizer, OuterVariable(outer, optimizer).state())
    list(executor.run(3))
    for step in range(3):
        tasks = [vector_task(index) for index in range(4 * step, 4 * step + 4)]
        gradient = plain_gradient(
            lambda x: torch.stack([problem.inner_loss({}, x, t.support) for t in tasks]).mean(),  # noqa: B023
            outer,
        )
        outer = add(outer, gradient, -0.5 * 0.2)
    assert_close(executor.state().outer, outer, 1e-13)


def test_outer_sgd_moves_the_start_towards_the_mean_of_the_ends():
    problem, task = maml_on_perceptron(), vector_task(0)
    outer = problem.init_outer(generator(0))
    oracle, context, start = oracle_of(problem, outer, task)
    algorithm = Reptile(inner_steps=4)
    end = algorithm.adapt(oracle, context, start)
    result = task_hypergradients(problem, algorithm, outer, [task])
    assert_close(add(outer, result.total, -1.0), end, 1e-14)


@pytest.mark.parametrize("batch_norm", ["transductive", "inductive"])
def test_maml_is_accepted(batch_norm):
    problem = conv4("all", batch_norm)
    Reptile().check(problem, problem.init_outer(generator(0)), image_task(0))


@pytest.mark.parametrize(
    ("make", "task", "names"),
    [
        (lambda: conv4("head"), image_task(0), r"features\.0\.0\.weight, .* \.\.\."),
        (lambda: conv4("features.*"), image_task(0), r"head\.weight, head\.bias"),
        (Smooth, smooth_task(0), "a, b"),
        (lambda: Quadratic(2, 4), quadratic_task(0), "x"),
    ],
    ids=["ANIL", "BOIL", "smooth", "quadratic"],
)
def test_a_context_that_depends_on_the_outer_variable_is_refused(make, task, names):
    problem = make()
    message = rf"Reptile trains the start of adaptation only, but .* depends on {names}: use adapt"
    with pytest.raises(ValueError, match=message):
        Reptile().check(problem, problem.init_outer(generator(0)), task)

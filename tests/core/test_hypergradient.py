"""`task_hypergradients`: against plain torch.autograd, central differences, and loops."""

from typing import Any

import pytest
import torch
from torch.func import functional_call

from metadist.algorithm import OWN
from metadist.algorithms import ITD, Reptile
from metadist.chunks import vectorizes
from metadist.compute import Compute
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP, Conv4
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.trees import add, tree_map
from tests.problems import (
    Quadratic,
    Smooth,
    assert_close,
    assert_same_bytes,
    assert_slopes,
    central_difference,
    generator,
    image_task,
    plain_gradient,
    plain_objective,
    quadratic_task,
    smooth_task,
    vector_task,
)

LOOP, VMAP = False, True


def conv4(adapt, batch_norm="transductive", batch_encode="auto"):
    torch.manual_seed(0)
    model = Conv4(n_way=3, width=3, image_size=16, batch_norm=batch_norm).double()
    return FewShotProblem(model, adapt=adapt, batch_encode=batch_encode)


def mlp(adapt, loss="mse"):
    torch.manual_seed(0)
    return FewShotProblem(MLP(3, 2, (5,)).double(), adapt=adapt, loss=loss)


CASES: dict[str, tuple[Any, Any]] = {
    "quadratic": (lambda: Quadratic(2, 4), quadratic_task),
    "smooth": (Smooth, smooth_task),
    "MAML on a perceptron": (lambda: mlp("all"), vector_task),
    "ANIL on Conv4": (lambda: conv4("head"), image_task),
    "ANIL on Conv4, encoded together": (lambda: conv4("head", batch_encode=True), image_task),
    "MAML on Conv4": (lambda: conv4("all"), image_task),
    "MAML on inductive Conv4": (lambda: conv4("all", "inductive"), image_task),
    "BOIL on Conv4": (lambda: conv4("features.*"), image_task),
}


@pytest.fixture(params=CASES)
def case(request):
    make, task_of = CASES[request.param]
    problem = make()
    return problem, problem.init_outer(generator(0)), [task_of(index) for index in range(3)]


def test_tasks_together_are_tasks_in_a_loop(case):
    problem, outer, tasks = case
    algorithm = ITD(inner_steps=2, inner_lr=0.1)
    loop = task_hypergradients(
        problem, algorithm, outer, tasks, compute=Compute(vectorize=LOOP), report=True
    )
    assert loop.num_tasks == 3 and loop.dropped == ()
    for chunk_size in (None, 2, 99):
        together = task_hypergradients(
            problem,
            algorithm,
            outer,
            tasks,
            compute=Compute(vectorize=VMAP, chunk_size=chunk_size),
            report=True,
        )
        assert_close(together.total, loop.total)
        assert together.num_tasks == 3
        assert together.metrics == pytest.approx(loop.metrics, rel=1e-10)


def test_the_result_is_the_sum_over_tasks(case):
    problem, outer, tasks = case
    algorithm = ITD(inner_steps=1)
    both = task_hypergradients(problem, algorithm, outer, tasks[:2], report=True)
    one, two = (
        task_hypergradients(problem, algorithm, outer, [task], report=True) for task in tasks[:2]
    )
    assert_close(both.total, add(one.total, two.total))
    assert list(both.total) == list(outer)
    for name, value in both.metrics.items():
        assert value == pytest.approx(one.metrics[name] + two.metrics[name], rel=1e-10)


def test_the_hypergradient_is_that_of_plain_autograd_through_everything(case):
    problem, outer, tasks = case
    result = task_hypergradients(problem, ITD(inner_steps=2, inner_lr=0.1), outer, tasks[:2])
    assert_close(
        result.total,
        plain_gradient(
            lambda x: sum(  # type: ignore[arg-type, return-value]
                plain_objective(problem, x, task, 2, 0.1) for task in tasks[:2]
            ),
            outer,
        ),
    )


@pytest.mark.parametrize("adapt", ["all", "head"])
def test_the_hypergradient_of_conv4_agrees_with_central_differences(adapt):
    problem = conv4(adapt)
    outer, task = problem.init_outer(generator(0)), image_task(1)
    result = task_hypergradients(problem, ITD(inner_steps=2), outer, [task])
    assert_slopes(result.total, lambda x: plain_objective(problem, x, task, 2, 0.1), outer)


def logits_of_support_and_query(model, params, task):
    """Two calls of the model: each set by its own statistics."""
    return [
        functional_call(model, params, (batch.tensors[0],)) for batch in (task.support, task.query)
    ]


def test_maml_is_the_loop_that_one_would_write_by_hand():
    torch.manual_seed(0)
    model = Conv4(n_way=3, width=3, image_size=16).double()
    outer = {name: leaf.detach().requires_grad_() for name, leaf in model.named_parameters()}
    tasks = [image_task(index) for index in range(2)]
    total = torch.zeros((), dtype=torch.float64)
    for task in tasks:
        fast = outer
        for _ in range(3):
            logits, _ = logits_of_support_and_query(model, fast, task)
            loss = torch.nn.functional.cross_entropy(logits, task.support.tensors[1])
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {
                name: leaf - 0.1 * gradient
                for (name, leaf), gradient in zip(fast.items(), gradients, strict=True)
            }
        _, logits = logits_of_support_and_query(model, fast, task)
        total = total + torch.nn.functional.cross_entropy(logits, task.query.tensors[1])
    expected = torch.autograd.grad(total, list(outer.values()))
    problem = FewShotProblem(model, adapt="all")
    detached = tree_map(torch.Tensor.detach, outer)
    result = task_hypergradients(problem, ITD(inner_steps=3, inner_lr=0.1), detached, tasks)
    assert_close(result.total, dict(zip(outer, expected, strict=True)))


@pytest.mark.parametrize("batch_encode", [True, False])
def test_anil_is_the_loop_that_one_would_write_by_hand(batch_encode):
    torch.manual_seed(0)
    model = Conv4(n_way=3, width=3, image_size=16).double()
    tasks = [image_task(index) for index in range(2)]
    total = torch.zeros((), dtype=torch.float64)
    for task in tasks:
        support, query = (model.features(batch.tensors[0]) for batch in (task.support, task.query))
        weight, bias = model.head.weight, model.head.bias
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(
                support @ weight.T + bias, task.support.tensors[1]
            )
            gradients = torch.autograd.grad(loss, (weight, bias), create_graph=True)
            weight, bias = weight - 0.1 * gradients[0], bias - 0.1 * gradients[1]  # type: ignore[assignment]
        loss = torch.nn.functional.cross_entropy(query @ weight.T + bias, task.query.tensors[1])
        total = total + loss
    expected = torch.autograd.grad(total, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    problem = FewShotProblem(model, adapt="head", batch_encode=batch_encode)
    outer = problem.init_outer(generator(0))
    for vectorize in (LOOP, VMAP):
        result = task_hypergradients(
            problem,
            ITD(inner_steps=3, inner_lr=0.1),
            outer,
            tasks,
            compute=Compute(vectorize=vectorize),
        )
        assert_close(result.total, dict(zip(names, expected, strict=True)))


def break_task(task):
    """The task with a NaN in its query inputs."""
    task.query.tensors[0].view(-1)[0] = torch.nan
    return task


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(("vectorize", "chunk_size"), [(LOOP, None), (VMAP, None), (VMAP, 2)])
@pytest.mark.parametrize("name", ["quadratic", "ANIL on Conv4", "ANIL on Conv4, encoded together"])
def test_a_task_that_is_not_finite_is_named_and_left_out(name, vectorize, chunk_size, position):
    make, task_of = CASES[name]
    problem = make()
    outer = problem.init_outer(generator(0))
    tasks = [task_of(index) for index in (10, 11, 12)]
    good = [task for index, task in enumerate(tasks) if index != position]
    algorithm = ITD(inner_steps=2)
    expected = task_hypergradients(problem, algorithm, outer, good, report=True)
    break_task(tasks[position])
    problem = make()  # a problem that sees the broken task first
    compute = Compute(vectorize=vectorize, chunk_size=chunk_size)
    result = task_hypergradients(problem, algorithm, outer, tasks, report=True, compute=compute)
    assert result.dropped == (10 + position,)
    assert result.num_tasks == 2
    assert_close(result.total, expected.total)
    assert result.metrics == pytest.approx(expected.metrics, rel=1e-10)


def test_where_no_task_is_finite_the_total_is_zero():
    problem = Quadratic(2, 4)
    outer = problem.init_outer(generator(0))
    tasks = [break_task(quadratic_task(index)) for index in (4, 2)]
    result = task_hypergradients(
        problem, ITD(), outer, tasks, compute=Compute(vectorize=VMAP), report=True
    )
    assert (result.num_tasks, result.dropped, result.metrics) == (0, (4, 2), {})
    assert_same_bytes(result.total, {"x": torch.zeros(2, dtype=torch.float64)})


def test_a_finite_hypergradient_whose_numbers_overflow_when_added_is_kept():
    class Steep(Quadratic):
        def outer_loss(self, context, inner, batch):
            return 1.2e308 * context["x"].sum()

    problem = Steep(2, 4)
    outer = problem.init_outer(generator(0))
    result = task_hypergradients(problem, ITD(inner_steps=1), outer, [quadratic_task(0)])
    assert (result.num_tasks, result.dropped) == (1, ())
    assert result.total["x"].tolist() == [1.2e308, 1.2e308]


def test_a_report_holds_losses_and_metrics_before_and_after_adaptation():
    problem = Smooth()
    outer, task = problem.init_outer(generator(0)), smooth_task(0)
    algorithm = ITD(inner_steps=3)
    assert task_hypergradients(problem, algorithm, outer, [task]).metrics == {}
    metrics = task_hypergradients(problem, algorithm, outer, [task], report=True).metrics
    context, start = problem.encode(outer, task), problem.init_inner(outer, task)
    adapted = start
    for _ in range(3):
        gradient = plain_gradient(lambda y: problem.inner_loss(context, y, task.support), adapted)
        adapted = add(adapted, gradient, -0.1)
    assert metrics == pytest.approx(
        {
            "support_loss": float(problem.inner_loss(context, adapted, task.support)),
            "query_loss": float(problem.outer_loss(context, adapted, task.query)),
            "query_loss_before": float(problem.outer_loss(context, start, task.query)),
            "query_error": float(problem.metrics(context, adapted, task.query)["error"]),
            "query_error_before": float(problem.metrics(context, start, task.query)["error"]),
        },
        rel=1e-10,
    )


@pytest.mark.parametrize("vectorize", [LOOP, VMAP])
@pytest.mark.parametrize("learn_lr", ["per_tensor", "per_element"])
def test_an_algorithm_s_own_variables_are_trained_and_hidden_from_the_problem(learn_lr, vectorize):
    class Watching(Smooth):
        def encode(self, outer, task):
            assert not any(name.startswith(OWN) for name in outer)
            return super().encode(outer, task)

        def init_inner(self, outer, task):
            assert not any(name.startswith(OWN) for name in outer)
            return super().init_inner(outer, task)

        def inner_loss(self, context, inner, batch):
            assert not any(name.startswith(OWN) for name in context)
            return super().inner_loss(context, inner, batch)

    problem, tasks = Watching(), [smooth_task(index) for index in range(2)]
    algorithm = ITD(inner_steps=3, inner_lr=0.2, learn_lr=learn_lr)
    outer = problem.init_outer(generator(0))
    outer = {**outer, **algorithm.init_own(problem.init_inner(outer, tasks[0]))}
    result = task_hypergradients(
        problem, algorithm, outer, tasks, compute=Compute(vectorize=vectorize)
    )
    assert list(result.total) == list(outer)

    def objective(x):
        rates = {name: x[f"{OWN}inner_lr.{name}"] for name in ("w", "m")}
        x = {name: leaf for name, leaf in x.items() if not name.startswith(OWN)}
        return sum(plain_objective(problem, x, task, 3, rates) for task in tasks)

    assert_close(result.total, plain_gradient(objective, outer))
    assert_close(result.total, central_difference(objective, outer), 1e-8)


@pytest.mark.parametrize("vectorize", [LOOP, VMAP])
def test_mini_batches_are_a_function_of_seed_and_task(vectorize):
    problem = Smooth()
    outer = problem.init_outer(generator(0))
    tasks = [smooth_task(index, num_support=12, num_query=9) for index in range(3)]

    def total(seed):
        return task_hypergradients(
            problem,
            ITD(inner_steps=3),
            outer,
            tasks,
            compute=Compute(vectorize=vectorize, batch_size=4, seed=seed),
        ).total

    assert_same_bytes(total(1), total(1))
    assert not torch.equal(total(1)["a"], total(2)["a"])
    loop = task_hypergradients(
        problem,
        ITD(inner_steps=3),
        outer,
        tasks,
        compute=Compute(vectorize=LOOP, batch_size=4, seed=1),
    )
    assert_close(total(1), loop.total)


@pytest.mark.parametrize(
    ("chunk_size", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])]
)
def test_chunk_size_bounds_how_many_tasks_go_together(chunk_size, sizes):
    seen = []

    class Watching(Smooth):
        def encode_tasks(self, outer, tasks):
            seen.append(len(tasks.id))
            return super().encode_tasks(outer, tasks)

        def encode(self, outer, task):
            if isinstance(task.id, int) and outer["a"].requires_grad:
                seen.append(1)
            return super().encode(outer, task)

    problem, tasks = Watching(), [smooth_task(index) for index in range(5)]
    outer = problem.init_outer(generator(0))
    compute = Compute(vectorize=VMAP, chunk_size=chunk_size)
    task_hypergradients(problem, ITD(1), outer, tasks, compute=compute, is_checked=True)
    assert seen == sizes


def test_tasks_of_unequal_size_go_one_by_one():
    problem = Smooth()
    outer = problem.init_outer(generator(0))
    tasks = [smooth_task(0), smooth_task(1, num_support=7)]
    one, two = (task_hypergradients(problem, ITD(), outer, [task]).total for task in tasks)
    assert_close(task_hypergradients(problem, ITD(), outer, tasks).total, add(one, two))


@pytest.mark.parametrize(
    ("name", "algorithm", "expected"),
    [
        ("quadratic", ITD(), True),
        ("MAML on a perceptron", ITD(), True),
        ("ANIL on Conv4", ITD(), True),
        ("MAML on Conv4", ITD(), False),
        ("BOIL on Conv4", ITD(), False),
        ("quadratic", ITD(engine="unrolled"), True),
        ("quadratic", ITD(engine="higher"), False),
        ("quadratic", ITD(compile=True), True),
        ("MAML on Conv4", ITD(compile=True), False),
    ],
)
def test_auto_loops_where_inner_tensors_are_convolution_kernels_on_a_cpu(name, algorithm, expected):
    make, task_of = CASES[name]
    problem, tasks = make(), [task_of(0), task_of(1)]
    outer = problem.init_outer(generator(0))
    assert vectorizes("auto", problem, algorithm, outer, tasks) is expected
    assert not vectorizes("auto", problem, algorithm, outer, tasks[:1])
    assert not vectorizes(False, problem, algorithm, outer, tasks)


def test_an_algorithm_without_start_gradient_leaves_the_start_alone():
    problem = FewShotProblem(MLP(3, 2, (4,)).double(), loss="mse")

    class Still(ITD):
        def estimate(self, oracle, context, state):
            return super().estimate(oracle, context, state)._replace(start_gradient=None)

    outer = problem.init_outer(generator(0))
    result = task_hypergradients(problem, Still(), outer, [vector_task(0)])
    assert_same_bytes(result.total, tree_map(torch.zeros_like, outer))


def test_no_tasks_are_refused():
    problem = Quadratic(2, 4)
    with pytest.raises(ValueError, match="tasks must hold at least one task, got none"):
        task_hypergradients(problem, ITD(), problem.init_outer(generator(0)), [])


@pytest.mark.parametrize(
    ("algorithm", "sizes", "message"),
    [
        (
            ITD(engine="higher"),
            (5, 5),
            r"vectorize must be False or 'auto' with ITD\(.*engine does",
        ),
        (ITD(), (5, 6), r"vectorize=True needs tasks of equal shapes, got .*: use 'auto' or False"),
        (Reptile(), (5, 6), r"vectorize=True needs tasks of equal shapes"),
    ],
)
def test_vectorize_is_refused_where_it_cannot_be(algorithm, sizes, message):
    problem = Smooth()
    tasks = [smooth_task(index, num_support=size) for index, size in enumerate(sizes)]
    with pytest.raises(ValueError, match=message):
        task_hypergradients(
            problem,
            algorithm,
            problem.init_outer(generator(0)),
            tasks,
            compute=Compute(vectorize=True),
        )

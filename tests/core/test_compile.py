"""`compile=True`: the same numbers, one compilation, and a warning where there is none."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

from metadist import compiled as compiled_module
from metadist.algorithms import ITD
from metadist.compiled import Kernels, _Graph
from metadist.compute import Compute
from metadist.evaluation import evaluate
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP, Conv4
from metadist.step_rules import SGD, Adam
from metadist.tasks import Sinusoid
from metadist.tasks.few_shot.problem import FewShotProblem
from metadist.trees import zeros_like
from tests.problems import Smooth, assert_close, generator, image_task, smooth_task, vector_task

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def hypergradient(problem, tasks, **options):
    algorithm = ITD(inner_lr=0.1, **options)
    outer = problem.init_outer(generator(0))
    assert not algorithm.init_own(outer)
    return task_hypergradients(problem, algorithm, outer, tasks, report=True)


def plain(problem, tasks, inner_steps):
    """The hypergradient of MAML by torch.autograd through all steps."""
    outer = problem.init_outer(generator(0))
    total = zeros_like(outer)
    for task in tasks:
        start = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
        context, y = problem.encode(start, task), problem.init_inner(start, task)
        for _ in range(inner_steps):
            loss = problem.inner_loss(context, y, task.support)
            found = torch.autograd.grad(loss, list(y.values()), create_graph=True)
            y = {name: leaf - 0.1 * g for (name, leaf), g in zip(y.items(), found, strict=True)}
        loss = problem.outer_loss(context, y, task.query)
        found = torch.autograd.grad(loss, list(start.values()), materialize_grads=True)
        total = {name: total[name] + g for name, g in zip(start, found, strict=True)}
    return total


def assert_compiled_is_eager(problem, tasks, num_functions):
    torch._dynamo.reset()
    counters.clear()
    for inner_steps in (2, 5):
        compiled = hypergradient(problem, tasks, inner_steps=inner_steps, compile=True)
        eager = hypergradient(problem, tasks, inner_steps=inner_steps)
        assert_close(compiled.total, plain(problem, tasks, inner_steps), 1e-10)
        assert compiled.metrics == pytest.approx(eager.metrics, rel=1e-10)
        assert compiled.calls == eager.calls
        # Once whatever the number of steps and tasks.
        assert counters["stats"]["unique_graphs"] == num_functions
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.timeout(300)
def test_tasks_compiled_together_are_eager_and_compiled_once_whatever_the_number_of_steps():
    torch.manual_seed(0)
    problem = FewShotProblem(MLP(3, 2, (4,)).double(), loss="mse")
    tasks = [vector_task(index) for index in range(2)]
    assert_compiled_is_eager(problem, tasks, num_functions=3)  # the step, its product, and f


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("adapt", "batch_norm", "num_functions"),
    # The step and f; the product is part of the step, or of tasks that go together by itself.
    [("all", "inductive", 2), ("head", "transductive", 3)],
)
def test_compiled_conv4_is_eager(adapt, batch_norm, num_functions):
    torch.manual_seed(0)
    model = Conv4(n_way=3, width=3, image_size=16, batch_norm=batch_norm).double()
    problem = FewShotProblem(model, adapt=adapt)
    tasks = [image_task(index) for index in range(2)]
    assert_compiled_is_eager(problem, tasks, num_functions)


@pytest.fixture
def as_it_is(monkeypatch):
    """A compiler that gives the function itself: what is around it is tested in no time."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


ONE_THREAD = Compute(num_threads=1)


def both(problem, tasks, compute=ONE_THREAD, states=None, **options):
    outer = problem.init_outer(generator(0))
    found = []
    for compile in (True, False):
        algorithm = ITD(inner_lr=0.1, compile=compile, **options)
        y = problem.init_inner(outer, tasks[0])
        own = {**outer, **algorithm.init_own(y)}
        found.append(
            task_hypergradients(
                problem, algorithm, own, tasks, compute=compute, report=True, states=states
            )
        )
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"inner_optimizer": SGD(0.1, momentum=0.9)},
        {"learn_lr": "per_tensor"},
        {"learn_lr": "per_element", "inner_optimizer": SGD(0.1, momentum=0.5)},
        {"inner_optimizer": Adam(0.1)},
        {"truncate": 1},
        {"first_order": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("vectorize", [True, False])
def test_stacks_of_tasks_have_the_draws_counts_and_options_of_single_ones(
    as_it_is, options, batch_size, vectorize
):
    compute = Compute(vectorize=vectorize, batch_size=batch_size, num_threads=1)
    problem, tasks = Smooth(), [smooth_task(index) for index in range(3)]
    compiled, eager = both(problem, tasks, compute, inner_steps=3, **options)
    assert_close(compiled.total, eager.total, 1e-12)
    assert compiled.metrics == pytest.approx(eager.metrics, rel=1e-12)
    assert compiled.calls == eager.calls


def test_kept_states_are_those_of_the_uncompiled_run(as_it_is):
    problem, tasks = Smooth(), [smooth_task(index) for index in range(3)]
    states = both(problem, tasks, states={})[0].states
    compiled, eager = both(problem, tasks, states=states)
    for task in tasks:
        assert_close({"y": compiled.states[task.id]}, {"y": eager.states[task.id]}, 1e-12)
    assert not torch.equal(compiled.states[0], states[0])


def test_evaluation_adapts_by_compiled_steps(as_it_is, monkeypatch):
    names = []
    get = Kernels.get

    def noted(kernels, name, *rest):
        names.append(name)
        return get(kernels, name, *rest)

    monkeypatch.setattr(Kernels, "get", noted)
    torch.manual_seed(0)
    problem = FewShotProblem(MLP(1, 1, (4,)), loss="mse")
    outer = problem.init_outer(generator(0))
    found = [
        evaluate(problem, Sinusoid(), ITD(inner_steps=3, compile=compile), outer, num_tasks=5)
        for compile in (True, False)
    ]
    assert names == ["inner_grad"] * 3
    assert found[0].score == pytest.approx(found[1].score, rel=1e-6)


def test_graphs_beyond_the_memory_for_them_are_computed_again(as_it_is, monkeypatch):
    monkeypatch.setattr(_Graph, "num_bytes", lambda graph: 100)
    compute = Compute(graph_budget=250, num_threads=1)
    graphs = []
    start = _Graph.__init__

    def noted(graph, *arguments):
        graphs.append(graph)
        start(graph, *arguments)

    monkeypatch.setattr(_Graph, "__init__", noted)
    compiled, eager = both(Smooth(), [smooth_task(0)], compute, inner_steps=4)
    # Two to compare what is compiled with what is not; of four steps there is room for two.
    assert len(graphs) == 2 + 4 + 2
    assert_close(compiled.total, eager.total, 1e-12)


def test_what_computes_something_else_when_compiled_is_computed_uncompiled(monkeypatch):
    def half(function, **options):
        def call(*args):
            return tree_map(lambda leaf: leaf / 2, function(*args))

        return call

    monkeypatch.setattr(torch, "compile", half)
    problem, tasks = Smooth(), [smooth_task(index) for index in range(3)]
    with pytest.warns(
        RuntimeWarning, match="no effect, the compiled inner_grad is 5e-01 from what it was"
    ) as warned:
        compiled, eager = both(problem, tasks, Compute(batch_size=3, num_threads=1))
    assert len(warned) == 1
    assert all(torch.equal(compiled.total[name], leaf) for name, leaf in eager.total.items())
    assert compiled.calls == eager.calls


def test_shapes_beyond_the_bound_are_computed_uncompiled(as_it_is, monkeypatch):
    monkeypatch.setattr(compiled_module, "MOST", 2)
    problem = Smooth()
    compiled, eager = both(problem, [smooth_task(0)])
    assert_close(compiled.total, eager.total, 1e-12)
    with pytest.warns(RuntimeWarning, match="more shapes than the 2 compiled functions") as warned:
        found = [both(problem, [smooth_task(0, num_support=7)]) for _ in range(2)]
    assert len(warned) == 1
    compiled, eager = found[1]
    assert all(torch.equal(compiled.total[name], leaf) for name, leaf in eager.total.items())


class NoCompiler:
    """What `torch.compile` gives where no compiler works: it fails at the first call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function, **options):
        def compiled(*args):
            self.calls += 1
            raise TorchDynamoException("no compiler here\nand a long trace")

        return compiled


def test_where_the_compiler_fails_the_derivatives_run_uncompiled_with_a_warning(monkeypatch):
    no_compiler = NoCompiler()
    monkeypatch.setattr(torch, "compile", no_compiler)
    problem, tasks = Smooth(), [smooth_task(0), smooth_task(1)]
    message = r"compile=True has no effect, torch.compile failed: no compiler here; install a C\+\+"
    with pytest.warns(RuntimeWarning, match=message) as warned:
        compiled = hypergradient(problem, tasks, inner_steps=3, compile=True)
    assert len(warned) == 1
    assert no_compiler.calls == 1  # and it is not tried again
    assert_close(compiled.total, hypergradient(problem, tasks, inner_steps=3).total, 1e-12)


def test_an_error_of_the_problem_itself_is_raised_readable(monkeypatch):
    class Wrong(Smooth):
        fails = False

        def inner_loss(self, context, inner, batch):
            if self.fails:
                raise KeyError("an error of the user")
            return super().inner_loss(context, inner, batch)

    problem = Wrong()
    hypergradient(problem, [smooth_task(0)])
    problem.fails = True
    monkeypatch.setattr(torch, "compile", NoCompiler())
    with (
        pytest.warns(RuntimeWarning, match="no compiler here"),
        pytest.raises(KeyError, match="an error of the user"),
    ):
        hypergradient(problem, [smooth_task(0)], compile=True)


SCRIPT = """
import warnings
from tests.core.test_compile import *
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    compiled = hypergradient(Smooth(), [smooth_task(0)], inner_steps=2, compile=True)
assert_close(compiled.total, hypergradient(Smooth(), [smooth_task(0)], inner_steps=2).total)
print([str(w.message) for w in caught if w.category is RuntimeWarning])
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_machine_without_a_cpp_compiler_is_warned_and_served(tmp_path):
    environment = dict(os.environ, CXX="/missing/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "compile=True has no effect" in result.stdout

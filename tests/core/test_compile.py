"""`compile=True`: the same numbers, one compilation, and a warning where no compiler works."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from metadist.algorithms import ITD
from metadist.hypergradient import task_hypergradients
from metadist.models import MLP, Conv4
from metadist.tasks.few_shot.problem import FewShotProblem
from tests.problems import Smooth, assert_close, generator, image_task, smooth_task, vector_task

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def hypergradient(problem, tasks, **options):
    algorithm = ITD(inner_lr=0.1, **options)
    outer = problem.init_outer(generator(0))
    assert not algorithm.init_own(outer)
    return task_hypergradients(problem, algorithm, outer, tasks, report=True)


def assert_compiled_is_eager(problem, tasks):
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    for inner_steps in (2, 5):
        for number in range(2):
            compiled = hypergradient(problem, tasks[number:], inner_steps=inner_steps, compile=True)
            graphs.append(counters["stats"]["unique_graphs"])
            eager = hypergradient(problem, tasks[number:], inner_steps=inner_steps)
            assert_close(compiled.total, eager.total, 1e-10)
            assert compiled.metrics == pytest.approx(eager.metrics, rel=1e-10)
    # inner_grad, outer_grads, second_order: once, whatever the number of steps and tasks.
    assert graphs == [3, 3, 3, 3]
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.timeout(300)
def test_compiled_is_eager_and_is_compiled_once_whatever_the_number_of_steps():
    torch.manual_seed(0)
    problem = FewShotProblem(MLP(3, 2, (4,)).double(), loss="mse")
    assert_compiled_is_eager(problem, [vector_task(index) for index in range(2)])


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("adapt", "batch_norm"), [("all", "inductive"), ("head", "transductive")])
def test_compiled_conv4_is_eager(adapt, batch_norm):
    torch.manual_seed(0)
    model = Conv4(n_way=3, width=3, image_size=16, batch_norm=batch_norm).double()
    problem = FewShotProblem(model, adapt=adapt)
    assert_compiled_is_eager(problem, [image_task(index) for index in range(2)])


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
    assert len(warned) == 3  # one per derivative that is used
    assert no_compiler.calls == 3  # and it is not tried again
    assert_close(compiled.total, hypergradient(problem, tasks, inner_steps=3).total, 1e-12)


def test_an_error_of_the_problem_itself_is_raised_readable(monkeypatch):
    class Wrong(Smooth):
        def inner_loss(self, context, inner, batch):
            raise KeyError("an error of the user")

    monkeypatch.setattr(torch, "compile", NoCompiler())
    with (
        pytest.warns(RuntimeWarning, match="no compiler here"),
        pytest.raises(KeyError, match="an error of the user"),
    ):
        hypergradient(Wrong(), [smooth_task(0)], compile=True)


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

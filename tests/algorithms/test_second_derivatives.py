"""Which algorithms take second derivatives of the losses: by running them on one that has none."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadist import Problem, Task, task_hypergradients
from metadist.algorithm import Algorithm
from metadist.algorithms import ALGORITHMS, BOME, ITD
from metadist.compute import Compute
from metadist.task import Batch
from metadist.trees import Params


class Slope(torch.autograd.Function):
    """The derivative of tanh, without one of its own."""

    @staticmethod
    def forward(gradient: Tensor, y: Tensor) -> Tensor:
        return (1 - y * y) * gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("a second derivative was asked for")


class Tanh(torch.autograd.Function):
    """Differentiable once."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Slope.apply(gradient, *ctx.saved_tensors)


class Once(Problem):
    """Losses that are differentiable once, and the attention kernels they may use."""

    fused: bool | None = None

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.ones(2)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": torch.zeros(2)}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        self.fused = torch.backends.cuda.flash_sdp_enabled()
        found: Tensor = Tanh.apply(inner["y"] * context["x"])
        return ((found - batch.tensors[0]) ** 2).mean() + inner["y"].square().sum()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        found: Tensor = Tanh.apply(inner["y"] + context["x"])
        return ((found - batch.tensors[0]) ** 2).mean()


TASK = Task(Batch.of(torch.rand(4, 2)), Batch.of(torch.rand(4, 2)), 0)
CASES: dict[str, Algorithm] = {
    **{name: cast(Any, cls)(inner_steps=5, inner_lr=0.2) for name, cls in ALGORITHMS.items()},
    "fomaml": ITD(inner_steps=3, inner_lr=0.1, first_order=True),
    "fomaml, unrolled": ITD(inner_steps=3, inner_lr=0.1, first_order=True, engine="unrolled"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_algorithm_says_whether_it_takes_second_derivatives(name):
    algorithm, problem = CASES[name], Once()
    outer = problem.init_outer(torch.Generator())
    outer |= algorithm.init_own(problem.init_inner(outer, TASK))
    compute = Compute(vectorize=False)
    keeps_states = algorithm.trains == "context"

    def steps() -> None:  # some methods take none in their first step
        states: Any = {} if keeps_states else None
        for number in range(3):
            found = task_hypergradients(
                *(problem, algorithm, outer, [TASK]),
                compute=compute,
                step=number,
                states=states,
                is_checked=True,
            )
            assert not found.dropped
            states = found.states if keeps_states else None

    if algorithm.takes_second_derivatives:
        with pytest.raises(NotImplementedError):
            steps()
    else:
        steps()
    assert problem.fused is not algorithm.takes_second_derivatives


class Attends(Once):
    """A layer of attention whose queries are adapted."""

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": torch.eye(8)}

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.ones(8)}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        (inputs,) = batch.tensors
        found = F.scaled_dot_product_attention(inputs @ inner["y"] * context["x"], inputs, inputs)
        return (found - inputs).square().mean()

    outer_loss = inner_loss


@pytest.mark.parametrize("algorithm", [ITD(2, 0.1, first_order=True), BOME(2, 0.1)])
@pytest.mark.parametrize("vectorize", [True, False])
def test_fused_attention_gives_what_plain_attention_does(algorithm, vectorize):
    problem, draw = Attends(), torch.Generator().manual_seed(0)
    tasks = []
    for number in range(3):
        support, query = (Batch.of(torch.randn(2, 5, 8, generator=draw)) for _ in range(2))
        tasks.append(Task(support, query, number))
    outer = problem.init_outer(draw)
    arguments = (problem, algorithm, outer, tasks)

    def hypergradient() -> Tensor:
        compute = Compute(vectorize=vectorize)
        return task_hypergradients(*arguments, compute=compute, is_checked=True).total["x"]

    fused = hypergradient()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = hypergradient()
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-6)

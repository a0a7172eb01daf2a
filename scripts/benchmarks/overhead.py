"""What is paid beside the hypergradient: the server's step, a trainer's step, the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from contest import Contest, Job
from torch import Tensor

from metadist import OuterOptimizer, Problem, Task, Trainer, task_hypergradients
from metadist.algorithms import ITD
from metadist.outer import Contribution, LeaseResult, OuterVariable
from metadist.task import Batch
from metadist.tasks import FixedTasks
from metadist.trees import Params

SERVER_SIZE = 12_500_000
STEPS = 200


def server_contest() -> Contest:
    """One step of x in this process, without Ray."""
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(SERVER_SIZE, generator=draw)

    def metadist(clip_norm: float | None) -> Callable[[], Job]:
        def prepare() -> Job:
            outer = OuterVariable(
                {"x": torch.zeros(SERVER_SIZE)},
                OuterOptimizer("adam", lr=1e-3, clip_norm=clip_norm),
            )

            def job() -> None:
                version = outer.version
                result = LeaseResult(lease_id=version, version=version, num_tasks=1)
                outer.apply([Contribution(result=result, total=gradient)])

            return job

        return prepare

    def fused() -> Job:
        x = torch.zeros(SERVER_SIZE, requires_grad=True)
        adam = torch.optim.Adam([x], lr=1e-3, fused=True)

        def job() -> None:
            x.grad = gradient
            adam.step()

        return job

    def copy() -> Job:
        target = torch.empty_like(gradient)

        def job() -> None:
            target.copy_(gradient)

        return job

    return Contest(
        title=f"server's step, Adam, {SERVER_SIZE / 1e6:.1f} M numbers, one lease, no Ray",
        baseline="fused Adam",
        ways={
            "metadist, clipped": metadist(1.0),
            "metadist": metadist(None),
            "fused Adam": fused,
            "memcpy": copy,
        },
    )


class Tiny(Problem):
    """The smallest problem there is: two numbers."""

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"x": torch.ones(1)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return {"y": torch.zeros(1)}

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return ((inner["y"] - context["x"] * batch.tensors[0]) ** 2).mean()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return ((inner["y"] - batch.tensors[0]) ** 2).mean()


def step_contest() -> Contest:
    """`fit` against as many hypergradients of the same task alone."""
    task = Task(Batch.of(torch.arange(4.0)), Batch.of(torch.arange(4.0) + 4), 0)
    problem, algorithm = Tiny(), ITD(inner_steps=2, inner_lr=0.1)

    def fit() -> Job:
        trainer = Trainer(problem, FixedTasks([task]), algorithm, quiet=True)
        trainer.fit(10)

        def job() -> None:
            trainer.fit(trainer.version + STEPS)

        return job

    def hypergradients() -> Job:
        outer = problem.init_outer(torch.Generator())

        def job() -> None:
            states: dict[int, Tensor] = {}
            for _ in range(STEPS):
                states = task_hypergradients(
                    problem, algorithm, outer, [task], states=states
                ).states

        return job

    return Contest(
        title=f"{STEPS} smallest steps of `fit` (1 inner variable)",
        baseline="hypergradients alone",
        ways={"fit": fit, "hypergradients alone": hypergradients},
    )


def command_contest() -> Contest:
    """A command's CPU time is that of a process of its own."""

    def command(*arguments: str) -> Callable[[], Job]:
        def job() -> None:
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

        return lambda: job

    return Contest(
        title="start of a command",
        baseline="import torch",
        ways={
            "metadist --help": command("-m", "metadist", "--help"),
            "metadist train --help": command("-m", "metadist", "train", "--help"),
            "import torch": command("-c", "import torch"),
        },
    )


CONTESTS: dict[str, Callable[[], Contest]] = {
    "server": server_contest,
    "step": step_contest,
    "command": command_contest,
}

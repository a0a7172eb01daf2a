"""`ClusterOracle`: the oracle of a task whose data lies on many machines."""

from __future__ import annotations

import torch
from torch import Tensor

from metadist.cluster.data_parallel.layout import METHODS
from metadist.cluster.data_parallel.pending import Answer, Question, Rounds
from metadist.oracle import Draw, Draws
from metadist.problem import Problem, is_nonsmooth
from metadist.trees import Params, zeros_like


class ClusterOracle(Draws):
    """Asks all shards for every derivative and averages them, so each is that of the full sets.

    Results are `Pending`: questions that do not wait for one another go out in one round. Whatever
    is not linear in the losses (a step of conjugate gradients, a norm) is computed here, from
    averages. Values are not differentiable.

    Args:
        problem: for what needs no data, the prox.
        num_examples: in the full support and query set.
        batch_size, seed, step: as of `AutogradOracle`, whose draws it has.
        rounds: how questions are asked.
    """

    def __init__(
        self,
        problem: Problem,
        num_examples: tuple[int, int],
        batch_size: int | None,
        seed: int,
        step: int,
        rounds: Rounds,
    ) -> None:
        super().__init__(num_examples, 0, batch_size, seed, step)
        self._problem = problem
        self._rounds = rounds

    def _ask(self, method: str, draw: Draw, *trees: Params) -> Answer:
        x, y = trees[:2]
        value = {"value": torch.empty((), dtype=next(iter(y.values())).dtype)}
        like = tuple({"x": x, "y": y, "value": value}[role] for role in METHODS[method][1])
        return self._rounds.ask(Question(method, draw, trees), like)

    def inner_grad(self, x: Params, y: Params, draw: Draw) -> Params:
        return self._ask("inner_grad", draw, x, y)[0]

    def inner_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        along_x, along_y = self._ask("inner_grads", draw, x, y)
        return along_x, along_y

    def outer_grads(self, x: Params, y: Params, draw: Draw) -> tuple[Params, Params]:
        along_x, along_y = self._ask("outer_grads", draw, x, y)
        return along_x, along_y

    def second_order(self, x: Params, y: Params, v: Params, draw: Draw) -> tuple[Params, Params]:
        j_v, h_v = self._ask("second_order", draw, x, y, v)
        return j_v, h_v

    def hvp(self, x: Params, y: Params, v: Params, draw: Draw) -> Params:
        return self._ask("hvp", draw, x, y, v)[0]

    def directional(self, x: Params, y: Params, dx: Params, dy: Params, draw: Draw) -> Params:
        return self._ask("directional", draw, x, y, dx, dy)[0]

    def prox_inner(self, x: Params, y: Params, step_size: float) -> Params:
        if not is_nonsmooth(self._problem):
            return y
        moved: Params = self._rounds.later(self._problem.prox_inner, (x, y, step_size), y)
        return moved

    def nonsmooth_grad(self, x: Params, y: Params) -> Params:
        if not is_nonsmooth(self._problem):
            return zeros_like(x)
        gradient = torch.func.grad(self._problem.nonsmooth_loss)
        along_x: Params = self._rounds.later(gradient, (x, y), x)
        return along_x

    def inner_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        return self._ask("inner_value", draw, x, y)[0]["value"]

    def outer_value(self, x: Params, y: Params, draw: Draw) -> Tensor:
        return self._ask("outer_value", draw, x, y)[0]["value"]

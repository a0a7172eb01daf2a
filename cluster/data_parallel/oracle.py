"""`ClusterOracle`: the oracle of a task whose data lies on many machines.

It turns a derivative into a question (pending.py), which an `Exchange` puts to all shards; the
`ShardOracle` (data.py) of each answers it on its own examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metadist.cluster.data_parallel.pending import Question, Rounds
from metadist.draws import Draw, MiniBatches
from metadist.oracle import DERIVATIVES, NO_CONSTANTS, Constants, Oracle
from metadist.problem import Problem
from metadist.trees import Params


class ClusterOracle(Oracle):
    """Asks all shards for every derivative and averages them, so each is that of the full sets.

    Results are `Pending`: questions that do not wait for one another go out in one round. Whatever
    is not linear in the losses (a step of conjugate gradients, a norm) is computed here, from
    averages. Values are not differentiable.

    Args:
        problem: The problem; only its prox is used, which needs no data.
        mini_batches: The draws, those of an `AutogradOracle` on the whole task.
        rounds: How questions are asked.
        constants: What x does not enter.
        reports: Somebody reads the metrics of the estimate.
    """

    def __init__(
        self,
        problem: Problem,
        mini_batches: MiniBatches,
        rounds: Rounds,
        constants: Constants = NO_CONSTANTS,
        reports: bool = True,
    ) -> None:
        super().__init__(problem, mini_batches, constants, reports)
        self._rounds = rounds

    def derive(self, name: str, draw: Draw, *trees: Params) -> tuple[Params, ...]:
        x, y = trees[:2]
        value = {"value": torch.empty((), dtype=next(iter(y.values())).dtype)}
        likes = {"x": x, "y": y, "value": value}
        like = tuple(likes[role] for role in DERIVATIVES[name].gives)
        return self._rounds.ask(Question(name, draw, trees), like)

    def apply(self, function: Callable[..., Any], arguments: Any, like: Any) -> Any:
        return self._rounds.later(function, arguments, like)

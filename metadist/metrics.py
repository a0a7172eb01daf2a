"""The losses and metrics of one task, before and after adaptation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from metadist.problem import Problem, loss_and_metrics
from metadist.task import Batch
from metadist.trees import Params

Parts = Iterable[tuple[float, Batch]]
"""The parts of a set with their shares of it, see `in_parts`."""


def adaptation_metrics(
    problem: Problem,
    context: Params,
    start: Params | None,
    adapted: Params,
    support: Parts,
    query: Parts,
) -> dict[str, Tensor]:
    """Losses and metrics of one task at `adapted`, and (names ending in `_before`) at `start`."""
    points = {"": adapted} if start is None else {"": adapted, "_before": start}

    def of_support(batch: Batch) -> dict[str, Tensor]:
        return {"support_loss": problem.inner_loss(context, adapted, batch)}

    def of_query(batch: Batch) -> dict[str, Tensor]:
        found = {}
        for suffix, inner in points.items():
            loss, others = loss_and_metrics(problem, context, inner, batch)
            for name, value in {"loss": loss, **others}.items():
                found[f"query_{name}{suffix}"] = value
        return found

    return {**mean_over(support, of_support), **mean_over(query, of_query)}


def mean_over(parts: Parts, function: Callable[[Batch], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean by name of what `function` returns for parts, weighted by their shares."""
    mean: dict[str, Tensor] = {}
    with torch.no_grad():
        for share, batch in parts:
            for name, value in function(batch).items():
                part = value.detach() if share == 1 else share * value.detach()
                mean[name] = mean[name] + part if name in mean else part
    return mean

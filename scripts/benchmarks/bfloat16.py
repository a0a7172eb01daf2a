"""Which methods bear bfloat16: hypergradients with autocast inside the losses beside float32.

    .venv/bin/python scripts/benchmarks/bfloat16.py [METHOD ...]

A row gives |h - h32| / |h32| and the cosine, for a decoder of 2 layers whose examples are weighted:
at the start and, from the states that float32 has left, after 20 outer steps at the same x. The
columns: autocast with y in float32, the same with rematerialised blocks, and y in bfloat16.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from rematerialise import Weights, llama, tokens
from torch import Tensor

from metadist import Adam, Compute, task_hypergradients
from metadist.algorithm import Algorithm, split_own
from metadist.algorithms import ALGORITHMS, F2SA, ITD, SAMA
from metadist.hypergradient import HypergradientSum
from metadist.models import rematerialise
from metadist.task import Batch, Task
from metadist.trees import Params, flatten, tree_map

NUM_STEPS = 20


class Rounded(Weights):
    """The model under autocast, or with its weights in another dtype."""

    def __init__(self, way: str) -> None:
        model = llama(2, width=48)
        if way == "y in bfloat16":
            model = model.bfloat16()
        super().__init__(rematerialise(model) if way == "rematerialised" else model, 8)
        self._autocasts = way in ("autocast", "rematerialised")

    def _losses(self, inner: Params, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocasts):
            return super()._losses(inner, batch)


WAYS = ("autocast", "rematerialised", "y in bfloat16")

METHODS: dict[str, Algorithm] = {
    **{name: cast(Any, cls)(inner_steps=5, inner_lr=0.1) for name, cls in ALGORITHMS.items()},
    "f2sa, lam=1": F2SA(5, 0.1, lam=1),
    "f2sa, lam=10": F2SA(5, 0.1, lam=10),
    "itd, adam": ITD(5, inner_optimizer=Adam(1e-3)),
    "sama, adam": SAMA(5, inner_optimizer=Adam(1e-3)),
}


def estimate(
    problem: Weights, method: Algorithm, task: Task, states: Mapping[int, Tensor], step: int
) -> HypergradientSum:
    outer = problem.init_outer(torch.Generator().manual_seed(0))
    inner = tree_map(Tensor.float, problem.init_inner(outer, task))
    return task_hypergradients(
        problem,
        method,
        {**outer, **method.init_own(inner)},
        [task],
        compute=Compute(vectorize=False),
        is_checked=True,
        step=step,
        states=None if method.trains == "start" else states,
    )


def error(found: HypergradientSum, exact: HypergradientSum) -> str:
    a, b = (flatten(split_own(result.total)[0]).double() for result in (found, exact))
    if found.dropped or exact.dropped or not b.any():
        return "-"
    return f"{float((a - b).norm() / b.norm()):.3f} ({float(a @ b / (a.norm() * b.norm())):.3f})"


def main() -> None:
    task, exact = tokens(8, 24), Rounded("float32")
    print("| method |", " | ".join(WAYS), "| after 20 steps:", " | ".join(WAYS), "|")
    for name in sys.argv[1:] or METHODS:
        method = METHODS[name]
        states: Mapping[int, Tensor] = {}
        row = []
        for step in range(NUM_STEPS + 1):
            found = estimate(exact, method, task, states, step)
            if step in (0, NUM_STEPS):
                for way in WAYS:
                    rounded = estimate(Rounded(way), method, task, states, step)
                    row.append(error(rounded, found))
            states = found.states
        print(f"| {name} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

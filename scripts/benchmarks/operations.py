"""How many operations a lease asks of a GPU, counted on a CPU: views are none.

    .venv/bin/python scripts/benchmarks/operations.py

Two tasks of Conv4 (5-way 5-shot) or of a small MLP, three inner steps. "by leaf" is what a CPU
computes, "fused" what a GPU is asked for: trees as lists of tensors, and metadist's batch norm.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metadist import task_hypergradients, trees
from metadist.algorithm import Algorithm
from metadist.algorithms import AID, BOME, ITD, LancBiO
from metadist.compute import Compute
from metadist.models import MLP, Conv4
from metadist.task import Task
from metadist.tasks import FewShotProblem, Glyphs, Sinusoid

STEPS: dict[str, Any] = {"inner_steps": 3, "inner_lr": 0.1}

LEASES: dict[str, tuple[Any, Algorithm]] = {
    "MAML": ("all", ITD(**STEPS)),
    "ANIL": ("head", ITD(**STEPS)),
    "AID": ("head", AID(**STEPS, adjoint_steps=4)),
    "LancBiO": ("head", LancBiO(**STEPS)),
    "BOME": ("head", BOME(**STEPS)),
}


class Operations(TorchDispatchMode):
    """Counts what runs within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def counted(model: str, name: str, vectorize: bool) -> Counter[str]:
    """The operations of a lease by name."""
    torch.manual_seed(0)
    adapt, algorithm = LEASES[name]
    if model == "Conv4":
        problem = FewShotProblem(Conv4(width=8), adapt=adapt)
        sampler: Any = Glyphs(n_way=5, k_shot=5, k_query=15)
    else:
        problem = FewShotProblem(MLP(hidden=(40, 40)), adapt=adapt, loss="mse")
        sampler = Sinusoid()
    tasks: list[Task] = [sampler.sample(index) for index in range(2)]
    outer = problem.init_outer(torch.Generator().manual_seed(0))
    states: dict[int, torch.Tensor] | None = {} if name == "LancBiO" else None

    def lease() -> None:
        task_hypergradients(
            *(problem, algorithm, outer, tasks),
            compute=Compute(vectorize=vectorize),
            states=states,
            is_checked=True,
        )

    lease()  # what is made once
    with Operations() as operations:
        lease()
    return operations.counts


def main() -> None:
    """Print the table."""
    print("| model | lease | vmap | by leaf | fused |\n|---|---|---|---|---|")
    for model in ("Conv4", "MLP"):
        for name in LEASES:
            for vectorize in (False, True):
                plain = counted(model, name, vectorize).total()
                trees.FUSED.add("cpu")  # a CPU then computes as a GPU does
                together = counted(model, name, vectorize).total()
                trees.FUSED.remove("cpu")
                way = "yes" if vectorize else "no"
                print(f"| {model} | {name} | {way} | {plain:,} | {together:,} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""Memory and time of one outer step of each method on a small decoder, as a table.

    .venv/bin/python scripts/benchmarks/language_models.py

Memory is the most that was allocated and not yet freed within the step, whatever the machine; time
is the least CPU time of two turns, on one thread, in gradients of the training loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from rematerialise import peak_bytes

from metadist import Algorithm, Compute, task_hypergradients
from metadist.algorithms import AID, BOME, F2SA, ITD, MEHA, SAMA
from metadist.task import Batch, Task
from metadist.tasks import HuggingFace, LanguageModelProblem, SourceWeights
from metadist.trees import gradients, leaves

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 8,
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 128,
}
METHODS: dict[str, Algorithm] = {
    "F2SA": F2SA(inner_steps=1, inner_lr=0.1),
    "BOME": BOME(inner_steps=1, inner_lr=0.1),
    "MEHA": MEHA(inner_steps=1, inner_lr=0.1),
    "SAMA": SAMA(inner_steps=1, inner_lr=0.1),
    "ITD, T = 2": ITD(inner_steps=2, inner_lr=0.1),
    "AID, Q = 3": AID(inner_steps=1, inner_lr=0.1, solver="neumann", adjoint_steps=3),
}


def tokens(seed: int) -> torch.Tensor:
    """8 x 128 tokens."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(4096, (8, 128), generator=random)


def least_seconds(function: Callable[[], Any]) -> float:
    """The least CPU time of two calls."""
    found = []
    for _ in range(2):
        began = time.process_time()
        function()
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    source = torch.arange(8) % 2
    task = Task(Batch.named(ids=tokens(0), source=source), Batch.named(ids=tokens(1)), 0)
    outer = {"logits": torch.zeros(2)}
    plain = LanguageModelProblem(HuggingFace(LLAMA), SourceWeights(["a", "b"]))
    small = LanguageModelProblem(
        HuggingFace(LLAMA, rematerialise=True),
        SourceWeights(["a", "b"]),
        micro_batch=2,
        logits_chunk=128,
    )

    def gradient() -> None:
        y = leaves(plain.init_inner(outer, task))
        gradients([plain.inner_loss(outer, y, task.support)], [None], y)

    unit = least_seconds(gradient)
    print(f"a gradient: {peak_bytes(gradient) / 1e6:.0f} MB, {unit:.2f} s")
    print("| method | memory | time | memory, parts | time, parts |\n|---|---|---|---|---|")
    for name, algorithm in METHODS.items():
        cells = []
        for problem in (plain, small):

            def step(problem: LanguageModelProblem = problem) -> None:
                task_hypergradients(
                    problem,
                    algorithm,  # noqa: B023  # called before the next one
                    outer,
                    [task],
                    compute=Compute(graph_budget=0),
                    states={},
                    is_checked=True,
                )

            cells.append(f"{peak_bytes(step) / 1e6:.0f} MB | {least_seconds(step) / unit:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

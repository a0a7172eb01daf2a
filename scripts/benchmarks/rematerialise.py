"""Rematerialised blocks beside plain ones: memory and time of products and of hypergradients.

    .venv/bin/python scripts/benchmarks/rematerialise.py [llama] [layers] [maml]

Memory is the most that was allocated and not yet freed within a call, whatever the machine; time is
the least CPU time of the turns that all alternatives take one after another, on one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from metadist import AutogradOracle, Compute, Problem, task_hypergradients
from metadist.algorithms import ITD
from metadist.models import Conv4, ResNet12, rematerialise
from metadist.task import Batch, Task
from metadist.tasks import FewShotProblem
from metadist.tasks.network import trainable, without_parameters
from metadist.trees import Params, flatten

TURNS = 2


class Weights(Problem):
    """A weight for each example of a decoder; x are the weights, y is the decoder."""

    def __init__(self, model: nn.Module, num_examples: int) -> None:
        self._start, self._num_examples = trainable(model), num_examples
        self._model = without_parameters(model)

    def init_outer(self, generator: torch.Generator) -> Params:
        return {"logits": torch.randn(self._num_examples, generator=generator)}

    def init_inner(self, outer: Params, task: Task) -> Params:
        return self._start

    def _losses(self, inner: Params, batch: Batch) -> Tensor:
        (ids,) = batch.tensors
        logits = (
            torch.func.functional_call(
                self._model, inner, (), {"input_ids": ids, "use_cache": False}
            )
            .logits[:, :-1]
            .float()
        )
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return losses.mean(1)

    def inner_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return (context["logits"].sigmoid()[batch.index] * self._losses(inner, batch)).mean()

    def outer_loss(self, context: Params, inner: Params, batch: Batch) -> Tensor:
        return self._losses(inner, batch).mean()


def llama(layers: int, width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=3 * width,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tokens(examples: int = 4, length: int = 256) -> Task:
    def batch(seed: int) -> Batch:
        random = torch.Generator().manual_seed(seed)
        return Batch.of(torch.randint(256, (examples, length), generator=random))

    return Task(batch(1), batch(2), 0)


def images(channels: int, size: int) -> Task:
    """5-way 1-shot, 15 queries of each class."""

    def batch(shots: int) -> Batch:
        random = torch.Generator().manual_seed(shots)
        labels = torch.arange(5).repeat_interleave(shots)
        return Batch.of(torch.randn(len(labels), channels, size, size, generator=random), labels)

    return Task(batch(1), batch(15), 0)


def product(problem: Problem, task: Task) -> Tensor:
    """(J v, H v) at the start, v = y."""
    outer = problem.init_outer(torch.Generator().manual_seed(0))
    oracle = AutogradOracle(problem, task, eager=True)
    y = problem.init_inner(outer, task)
    with sdpa_kernel(SDPBackend.MATH):
        j_v, h_v = oracle.second_order(outer, y, y, oracle.draw_inner())
    return torch.cat([flatten(j_v), flatten(h_v)])


def hypergradient(
    problem: Problem, task: Task, algorithm: ITD, graph_budget: int = 10**12
) -> Tensor:
    outer = problem.init_outer(torch.Generator().manual_seed(0))
    compute = Compute(graph_budget=graph_budget, vectorize=False)
    return flatten(
        task_hypergradients(
            problem, algorithm, outer, [task], compute=compute, is_checked=True
        ).total
    )


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that were allocated within the call and not yet freed."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def compared(title: str, ways: dict[str, Callable[[], Tensor]]) -> None:
    """Print memory and time of each way, and both relative to the first; results must agree."""
    expected = next(iter(ways.values()))()
    least = dict.fromkeys(ways, float("inf"))
    memory = {name: peak_bytes(way) for name, way in ways.items()}
    for _ in range(TURNS):
        for name, way in ways.items():
            began = time.process_time()
            found = way()
            least[name] = min(least[name], time.process_time() - began)
            error = float((found - expected).norm() / expected.norm())
            assert error < 1e-3, (title, name, error)
    print(title)
    first = next(iter(ways))
    for name in ways:
        print(
            f"  {name:34} {memory[name] / 1e6:8.1f} MB {least[name]:7.2f} s"
            f"   x {memory[name] / memory[first]:.3f} memory"
            f"   x {least[name] / least[first]:.2f} time"
        )


def decoders() -> None:
    task = tokens()
    plain, again = (
        Weights(change(llama(16)), 4) for change in (lambda model: model, rematerialise)
    )
    compared(
        "Llama, 16 layers of width 64, 4 x 256 tokens: one product (J v, H v)",
        {"plain": partial(product, plain, task), "rematerialised": partial(product, again, task)},
    )
    adjoint, unrolled = (ITD(2, 0.1, engine=engine) for engine in ("adjoint", "unrolled"))
    compared(
        "The same: hypergradient of ITD, 2 steps",
        {
            "plain unrolling": partial(hypergradient, plain, task, unrolled),
            "adjoint, no graphs": partial(hypergradient, plain, task, adjoint, 0),
            "rematerialised, no graphs": partial(hypergradient, again, task, adjoint, 0),
        },
    )


def layers() -> None:
    task = tokens()
    for change in (lambda model: model, rematerialise):
        sizes = []
        for number in (8, 32):
            model = change(llama(number))
            weights = sum(leaf.nbytes for leaf in model.parameters())
            sizes.append((peak_bytes(partial(product, Weights(model, 8), task)), weights))
        name = "rematerialised" if change is rematerialise else "plain"
        (few, few_weights), (many, many_weights) = sizes
        print(
            f"  {name:15} 8 layers {few / 1e6:7.1f} MB (weights {few_weights / 1e6:.1f}), "
            f"32 layers {many / 1e6:7.1f} MB (weights {many_weights / 1e6:.1f}): x {many / few:.2f}"
        )


def maml() -> None:
    settings: dict[str, tuple[Callable[[], nn.Module], Task]] = {
        "Conv4-64, 84 x 84": (partial(Conv4, 5, 3, 64, 84), images(3, 84)),
        "ResNet12, widths 32 to 320, 84 x 84": (
            partial(ResNet12, 5, 3, (32, 80, 160, 320), 84),
            images(3, 84),
        ),
    }
    for title, (make, task) in settings.items():
        problems = []
        for change in (lambda model: model, rematerialise):
            torch.manual_seed(0)
            problems.append(FewShotProblem(change(make())))
        plain, again = problems
        steps = ITD(2, 0.01)
        compared(
            f"MAML, {title}, 5-way 1-shot, 2 steps",
            {
                "graphs kept": partial(hypergradient, plain, task, steps),
                "no graphs": partial(hypergradient, plain, task, steps, 0),
                "rematerialised, no graphs": partial(hypergradient, again, task, steps, 0),
            },
        )


PARTS = {"llama": decoders, "layers": layers, "maml": maml}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()

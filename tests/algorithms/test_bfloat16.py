"""Which methods bear bfloat16, as they declare: hypergradients beside those in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metadist import Adam, task_hypergradients
from metadist.algorithm import Algorithm, split_own
from metadist.algorithms import ALGORITHMS, ITD
from metadist.compute import Compute
from metadist.hypergradient import HypergradientSum
from metadist.models import rematerialise
from metadist.task import Batch, to_device
from metadist.tasks.network import call
from metadist.trees import Params, flatten, tree_map
from tests.core.test_rematerialise import Weighted, decoder, task
from tests.problems import generator

TASK = to_device(task(), "cpu", torch.float32)


class Rounded(Weighted):
    """The model under autocast, or in another dtype; its losses and x are in float32."""

    def __init__(self, way: str) -> None:
        model = decoder(layers=1, frozen=False).float()
        if way == "rematerialised":
            model = rematerialise(model, "layers.*")
        dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        super().__init__(model.to(dtypes.get(way, torch.float32)))
        self._autocasts = way in ("autocast", "rematerialised")

    def init_outer(self, generator: torch.Generator) -> Params:
        return tree_map(Tensor.float, super().init_outer(generator))

    def _losses(self, inner: Params, batch: Batch) -> Tensor:
        inputs, targets = batch.tensors
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocasts):
            logits = call(self._model, inner, inputs.to(next(iter(inner.values())).dtype))
        return F.cross_entropy(logits.float(), targets, reduction="none")


def estimate(
    way: str, method: Algorithm, states: Mapping[int, Tensor], step: int
) -> HypergradientSum:
    problem = Rounded(way)
    outer = problem.init_outer(generator(0))
    inner = tree_map(Tensor.float, problem.init_inner(outer, TASK))
    return task_hypergradients(
        problem,
        method,
        {**outer, **method.init_own(inner)},
        [TASK],
        compute=Compute(vectorize=False),
        is_checked=True,
        step=step,
        states=None if method.trains == "start" else states,
    )


def errors(method: Algorithm, ways: tuple[str, ...], num_steps: int = 5) -> dict[str, list[float]]:
    """|h - h32| / |h32| of each way, at the start and from the states of steps in float32."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    states: Mapping[int, Tensor] = {}
    for step in range(num_steps + 1):
        exact = estimate("float32", method, states, step)
        if step in (0, num_steps):
            h = flatten(split_own(exact.total)[0])
            for way in ways:
                rounded = estimate(way, method, states, step)
                difference = flatten(split_own(rounded.total)[0]) - h
                found[way].append(float(difference.norm() / h.norm()))
        states = exact.states
    return found


# PBGD-Free leaves out all that x does here, and Reptile has no start to train.
MEASURED = [name for name in ALGORITHMS if name not in ("freepbgd", "reptile", "metasgd")]


@pytest.mark.parametrize("name", MEASURED)
def test_each_method_bears_what_it_declares(name):
    options = {"exact_probability": 1.0} if name == "ufom" else {}
    method = cast(Any, ALGORITHMS[name])(inner_steps=3, inner_lr=0.1, **options)
    found = errors(method, ("autocast", "bfloat16", "float16"))
    borne, rough = method.bears_rounding, found["bfloat16"]
    if borne == "float32":
        # Its h may be zero at the start, and the error is no number then.
        assert max(0.0, *reversed([*found["autocast"], *rough])) > 0.1
    else:
        assert found["autocast"][-1] < 0.1
        assert max(rough) > 0.1 if borne == "autocast" else max(rough) < 0.2
        assert borne == "autocast" or max(found["float16"]) < 0.02


def test_rematerialised_blocks_round_as_plain_ones_do():
    found = errors(ITD(3, 0.1), ("rematerialised", "autocast"))
    for error, plain in zip(*found.values(), strict=True):
        assert 0 < error < 0.05 and 0 < plain < 0.05


def test_derivatives_of_adam_bear_it_with_a_large_eps_alone():
    def worst(eps: float) -> float:
        method = ITD(3, inner_optimizer=Adam(1e-3, eps=eps))
        return max(errors(method, ("autocast",), num_steps=1)["autocast"])

    assert worst(1e-3) < 0.1 < worst(1e-8)

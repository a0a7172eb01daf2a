"""Sinusoid regression: the function, its distribution, determinism and errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from metadist.sampler import TaskSampler
from metadist.tasks import Sinusoid
from tests.tasks.helpers import equal, refusal


def fitted(task) -> tuple[float, float, float]:
    """(amplitude, phase, largest error) of a sine fitted to all points of a task."""
    x = torch.cat([task.support.tensors[0], task.query.tensors[0]]).double().numpy()[:, 0]
    y = torch.cat([task.support.tensors[1], task.query.tensors[1]]).double().numpy()[:, 0]
    basis = np.stack([np.sin(x), np.cos(x)], axis=1)
    (sine, cosine), *_ = np.linalg.lstsq(basis, y, rcond=None)
    return (
        math.hypot(sine, cosine),
        math.atan2(-cosine, sine),
        abs(basis @ (sine, cosine) - y).max(),
    )


def test_every_task_is_one_sine_within_the_published_ranges():
    sampler = Sinusoid()
    fits = [fitted(sampler.sample(index)) for index in range(500)]
    amplitudes, phases, errors = map(np.array, zip(*fits, strict=True))
    assert errors.max() < 1e-5
    assert 0.1 <= amplitudes.min() < 0.2 and 4.9 < amplitudes.max() <= 5.0
    assert -1e-4 <= phases.min() < 0.1 and math.pi - 0.1 < phases.max() <= math.pi + 1e-4
    assert abs(amplitudes.mean() - 2.55) < 5 * 4.9 / math.sqrt(12 * 500)


def test_shapes_and_points():
    task = Sinusoid(k_shot=5, k_query=7, domain=(2.0, 3.0)).sample(4)
    assert [t.shape for t in task.support.tensors] == [(5, 1), (5, 1)]
    assert [t.shape for t in task.query.tensors] == [(7, 1), (7, 1)]
    assert all(t.dtype == torch.float32 for t in (*task.support.tensors, *task.query.tensors))
    x = torch.cat([task.support.tensors[0], task.query.tensors[0]])
    assert len(x.unique()) == 12 and x.min() >= 2 and x.max() <= 3
    assert task.id == 4 and isinstance(Sinusoid(), TaskSampler)


def test_points_stay_different_where_numbers_are_few():
    low, high = 1.0, 1.0 + 300 * 2.0**-23  # about 300 numbers of float32
    task = Sinusoid(k_shot=50, k_query=100, domain=(low, high)).sample(0)
    assert len(torch.cat([task.support.tensors[0], task.query.tensors[0]]).unique()) == 150


def test_tasks_depend_on_seed_split_and_index():
    assert equal(Sinusoid(seed=3).sample(5), Sinusoid(seed=3).sample(5))
    tasks = [
        Sinusoid(seed=seed, split=split).sample(index)
        for seed in (0, 1)
        for split in ("train", "test")
        for index in (0, 1)
    ]
    assert len({task.query.tensors[0].numpy().tobytes() for task in tasks}) == len(tasks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_shot": 0}, "k_shot must be an integer >= 1, got 0"),
        ({"k_query": 0}, "k_query must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
        ({"phase": (1.0, 0.0)}, "phase must be (low, high) with low <= high, got (1.0, 0.0)"),
        ({"amplitude": 3.0}, "amplitude must be (low, high) with low <= high, got 3.0"),
        (
            {"domain": (0.0, math.inf)},
            "domain must be (low, high) with low <= high, got (0.0, inf)",
        ),
    ],
)
def test_errors(arguments: dict[str, Any], message: str):
    found = refusal(lambda: Sinusoid(**arguments))
    assert found == message


def test_a_domain_of_one_point_is_refused():
    found = refusal(lambda: Sinusoid(domain=(1.0, 1.0)).sample(0))
    assert found == (
        "domain must hold k_shot + k_query = 25 different float32 numbers, got (1.0, 1.0): widen it"
    )

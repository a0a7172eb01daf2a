"""x on a device: stepped there in one piece, with all that belongs to it, and one look a step."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from metadist import LocalExecutor, OuterOptimizer
from metadist.algorithms import AID, ITD, VRBO, LancBiO
from metadist.compute import Compute
from metadist.outer import BLOCK, OuterState, OuterVariable, StepRules
from metadist.tasks import FewShotProblem
from metadist.trees import num_elements
from metadist.workload import Workload
from tests.helpers import Images, small_conv4
from tests.pretend_device import DEVICE, Elsewhere, pretending
from tests.problems import computed_lease, generator

LENGTH = 2 * BLOCK + 77


def totals(version: int, length: int) -> list[torch.Tensor]:
    return [torch.randn(length, generator=generator(version, i)) for i in range(3)]


def leases(version: int, length: int, there: bool) -> list[Any]:
    return [
        computed_lease(
            3 * version + i,
            version,
            Elsewhere(total) if there else total,
            2,
            weight=1 / (1 + i),
        )
        for i, total in enumerate(totals(version, length))
    ]


def assert_near(found: OuterState, expected: OuterState) -> None:
    assert found[2:5] == expected[2:5]
    for field in ("outer", "optimizer", "recursion", "states"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours.keys() == theirs.keys(), field
        for name, leaf in ours.items():
            assert type(leaf) is torch.Tensor and leaf.device.type == "cpu", (field, name)
            torch.testing.assert_close(leaf, theirs[name], rtol=1e-3, atol=1e-4)


EVERY = [
    ("sgd", {"momentum": 0.9}),
    ("adam", {"fused": False}),  # torch's fused kernels know no pretend device
    ("adam", {"capturable": True}),
    ("adamw", {"fused": False}),
    ("rmsprop", {}),
    ("adagrad", {}),
]


@pytest.mark.parametrize("is_two_point", [False, True])
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_step_looks_once_and_is_that_of_the_cpu(name, options, is_two_point, monkeypatch):
    if "capturable" in options:
        allow_capturable(monkeypatch)
    config = OuterOptimizer(
        name, 0.05, options, clip_norm=0.5, clip_value=0.3, schedule="power", warmup_steps=2
    )
    rules = StepRules(recursive_weight=lambda version: 0.3) if is_two_point else None
    outer = {"x": torch.randn(LENGTH, generator=generator(1))}
    on_cpu = OuterVariable(outer, config, rules)
    with pretending() as waits:
        variable = OuterVariable(outer, config, rules, DEVICE)
        for version in range(4):
            length = LENGTH * (2 if is_two_point and version else 1)
            contributions = leases(version, length, there=True)
            waits.clear()
            step = variable.apply(contributions)
            assert sum(waits.values()) == 1, waits
            expected = on_cpu.apply(leases(version, length, there=False))
            assert step.hypergradient_norm == pytest.approx(expected.hypergradient_norm, rel=1e-6)
            if version == 1:  # as a resumed run does
                saved = variable.state()
                variable = OuterVariable.from_state(saved, config, rules, DEVICE)
        found = variable.state()
    assert_near(found, on_cpu.state())


def allow_capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's list of devices with kernels that read the number of steps there."""
    for module in ("adam", "optimizer"):
        of_torch = sys.modules[f"torch.optim.{module}"]
        monkeypatch.setattr(
            of_torch, "_get_capturable_supported_devices", lambda *_, **__: ["cpu", DEVICE.type]
        )


def test_what_is_not_finite_is_refused_there_too():
    with pretending():
        variable = OuterVariable({"x": torch.zeros(3)}, OuterOptimizer("sgd"), None, DEVICE)
        broken = torch.tensor([1.0, float("nan"), 0.0])
        with pytest.raises(ValueError, match=r"finite mean, got NaN or Inf from leases \[0\]"):
            variable.apply([computed_lease(0, 0, Elsewhere(broken))])
        assert variable.version == 0 and not variable.state().outer["x"].any()
        huge = torch.full((3,), 1e30)  # whose squares overflow in float32
        step = variable.apply([computed_lease(0, 0, Elsewhere(huge))])
        assert step.hypergradient_norm == pytest.approx(3**0.5 * 1e30)


ONCE_A_GROUP, COUNTERS, EIGENVALUES, NORM = 1, 1, 1, 1


@pytest.mark.parametrize(
    ("algorithm", "keep_state", "reads"),
    [
        (ITD(inner_steps=2, inner_lr=0.1), False, ONCE_A_GROUP + NORM),
        (AID(inner_steps=2, inner_lr=0.1, warm_start=True), True, ONCE_A_GROUP + COUNTERS + NORM),
        (VRBO(inner_lr=0.01, adjoint_lr=0.01), False, ONCE_A_GROUP + NORM),
        (LancBiO(inner_lr=0.1), True, ONCE_A_GROUP + COUNTERS + EIGENVALUES + NORM),
    ],
    ids=["ITD", "AID", "VRBO", "LancBiO"],
)
def test_a_run_keeps_x_and_states_on_the_device(algorithm, keep_state, reads, monkeypatch):
    problem = FewShotProblem(small_conv4(), adapt="head", weight_decay=0.1)
    work = Workload(
        *(problem, Images(), algorithm),
        meta_batch_size=4,
        tasks_per_lease=4,
        keep_state=keep_state,
        compute=Compute(vectorize=True, device="cpu"),
    )
    # Not Adam, which would blow up the biases before a batch norm, whose gradients are rounding.
    optimizer = OuterOptimizer("sgd", 0.01, {"momentum": 0.9}, clip_norm=1.0)
    outer = problem.init_outer(generator(0))
    first = OuterVariable(outer, optimizer, work.stepping_rules()).state()
    on_cpu = LocalExecutor()
    on_cpu.start(work, optimizer, first)
    for _ in on_cpu.run(3):
        pass
    with pretending() as waits:
        monkeypatch.setattr("metadist.executor.pick_device", lambda device: DEVICE)
        executor = LocalExecutor()
        executor.start(work, optimizer, first)
        seen = []
        for _ in executor.run(3):
            # What comes with the data is not of the step.
            seen.append({k: n for k, n in waits.items() if "feed.py" not in k})
            waits.clear()
        found = executor.state()
        assert len(waits) <= 3  # checkpoints read it all
    sums = [sum(of_step.values()) for of_step in seen]
    assert sums[1:] == [reads] * 2, seen
    assert num_elements(found.outer) == num_elements(outer)
    assert_near(found, on_cpu.state())

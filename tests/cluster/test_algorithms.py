"""Every algorithm on Ray: the bytes of one process, from a checkpoint in the middle on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from metadist.cluster import ASP, Policy, RayExecutor, View, Workers
from tests.algorithms.directions import MODES, NEW_TASKS, assert_resumes, trainer
from tests.cluster.conftest import Shared
from tests.problems import assert_same_bytes


class Lasting(RayExecutor):
    """Keeps its processes from one run to the next."""

    def close(self) -> None:
        pass

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="module")
def workers(shared: Shared) -> Iterator[Lasting]:
    shared.close()
    executor = Lasting(Workers(num_workers=2, start_timeout_s=600))
    yield executor
    executor.end()


@dataclass(frozen=True)
class InPairs(Policy):
    """A policy of a user: like BSP, but no more than two leases are out at a time."""

    is_synchronous = True

    def leases_to_apply(self, view: View) -> tuple[int, ...]:
        return tuple(view.arrived) if len(view.arrived) == view.leases_per_step else ()

    def may_issue(self, view: View) -> bool:
        num_out = len(view.in_flight)
        return num_out < 2 and num_out + len(view.arrived) < view.leases_per_step

    def leases_per_step(self, meta_batch: int) -> int:
        return meta_batch


def test_a_synchronous_policy_of_a_user_trains_kept_states_and_two_point_methods(shared):
    shared.close()
    workers = Lasting(Workers(num_workers=2, start_timeout_s=600), policy=InPairs())
    try:
        for name, keep_state in (("soba", True), ("mrbo", False)):
            local, mine = (
                trainer(NEW_TASKS[name], keep_state, **options)
                for options in ({}, {"executor": workers})
            )
            local.fit(3)
            mine.fit(3)
            assert_same_bytes(mine.outer, local.outer)
    finally:
        workers.end()


# New tasks go through the same code with every algorithm, but for two-point methods.
@pytest.mark.parametrize(
    ("name", "keep_state"),
    [
        pytest.param(
            *mode.values,
            id=mode.id,
            marks=() if mode.values[1] or mode.values[0] in ("itd", "mrbo") else pytest.mark.slow,
        )
        for mode in MODES
    ],
)
def test_ray_goes_on_from_a_checkpoint_to_the_bytes_of_one_process(
    workers, name, keep_state, tmp_path
):
    assert_resumes(NEW_TASKS[name], keep_state, tmp_path / "run", executor=workers)


@pytest.mark.parametrize(
    ("name", "keep_state", "why"),
    [("aid", True, "keep_state=True"), ("mrbo", False, "the two-point method MRBO")],
)
def test_a_policy_that_is_not_synchronous_is_refused(ray_session, name, keep_state, why):
    executor = RayExecutor(Workers(num_workers=2), policy=ASP())
    training = trainer(NEW_TASKS[name], keep_state, executor=executor)
    message = rf"policy must be synchronous, .*, with {why}, got .*asp.*: every step needs what"
    with pytest.raises(ValueError, match=message):
        training.fit(1)

"""An executor that loses x and goes back: every step counts once, whatever was reported before."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metadist.executor import LocalExecutor
from tests.helpers import curves, exact_state, make_trainer


class Forgetful(LocalExecutor):
    """Loses x after reporting some versions, and goes back to the last state it told.

    With `before_state`, between the report and the question for the state.
    """

    def __init__(self, *versions: int, before_state: bool = False) -> None:
        super().__init__()
        self._to_come = list(versions)
        self._before_state = before_state
        self.versions: list[int] = []

    def start(self, workload, optimizer, state) -> None:
        self._start = (workload, optimizer)
        self._last = state
        super().start(workload, optimizer, state)

    def state(self):
        self._last = super().state()
        return self._last

    def run(self, until_version):
        while (told := self._version()) < until_version:
            for report in super().run(told + 1):
                self.versions.append(report.step.version)
                due = self._to_come[:1] == [report.step.version]
                if due and self._before_state:
                    self._go_back()
                yield report
                if due and not self._before_state:
                    self._go_back()

    def _version(self) -> int:
        return self._started().version

    def _go_back(self) -> None:
        del self._to_come[0]
        super().start(*self._start, self._last)


@pytest.mark.parametrize("before_state", [False, True])
def test_steps_that_come_again_count_once(tmp_path, before_state):
    def trainer(**options):
        return make_trainer(
            val_sampler=curves("val"),
            val_every=2,
            val_tasks=2,
            checkpoint_every=2,
            log_every=1,
            **options,
        )

    whole = trainer(run_dir=tmp_path / "whole")
    expected = whole.fit(8)
    executor = Forgetful(3, 4, 8, before_state=before_state)
    disturbed = trainer(run_dir=tmp_path / "run", executor=executor)
    result = disturbed.fit(8)
    if before_state:
        assert executor.versions == [1, 2, 3, 3, 4, 3, 4, 5, 6, 7, 8, 7, 8]
    else:  # after the state of 4 and 8 was told
        assert executor.versions == [1, 2, 3, 3, 4, 5, 6, 7, 8]
    assert exact_state(disturbed) == exact_state(whole)
    assert (result.num_steps, result.num_tasks) == (8, expected.num_tasks)
    names = [sorted(p.name for p in (tmp_path / run / "checkpoints").iterdir()) for run in RUNS]
    assert names[0] == names[1]
    for tag in ("outer/hypergradient_norm", "loss/train", "loss/val"):
        first, second = (
            EventAccumulator(str(tmp_path / run / "tensorboard")).Reload() for run in RUNS
        )
        assert values(first, tag) == values(second, tag)


RUNS = ("whole", "run")


def values(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]

"""`Homes` and `Held`: which worker holds which kept states, of which version of x."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

W = TypeVar("W", bound=Hashable)


class Place(NamedTuple, Generic[W]):
    """Where a lease goes.

    Args:
        worker: The worker that is to compute it.
        is_held: Whether that worker holds the states of its tasks.
        source: Otherwise: the worker to fetch them from; None: the last snapshot.
    """

    worker: W
    is_held: bool
    source: W | None = None


class Homes(Generic[W]):
    """Which worker holds the states of the tasks of which lease of a step, by number.

    A lease stays with its worker while that lives, unless it has more than its equal share, as
    after another one has joined. What a worker holds is certain once it has answered.

    Args:
        num_leases: The leases in a step.
    """

    def __init__(self, num_leases: int) -> None:
        self._num_leases = num_leases
        self._workers: dict[int, W] = {}
        self._newest: dict[int, int] = {}

    @property
    def workers(self) -> dict[int, W]:
        """The worker of each lease that has one."""
        return dict(self._workers)

    def is_certain(self, number: int) -> bool:
        """Whether it is known which versions the worker of this lease holds, if it lives."""
        return number in self._newest

    def place(self, number: int, alive: Sequence[W], version: int, moves: bool = True) -> Place[W]:
        """Where the lease goes, which is its home from now on.

        Args:
            number: The number of the lease within a step.
            alive: The workers to choose from, one at least.
            version: The version of x.
            moves: Whether to leave a worker that has more than its share.
        """
        loads = dict.fromkeys(alive, 0)
        for other in self._workers.values():
            if other in loads:
                loads[other] += 1
        home = self._workers.get(number)
        is_alive = home is not None and home in loads
        # The newest is one ahead of x while the step with it is to be made.
        is_held = is_alive and self._newest.get(number, -1) in (version, version + 1)
        if home is None or not is_alive or (moves and loads[home] > self._share(len(alive))):
            worker = min(alive, key=lambda worker: loads[worker])
        else:
            worker = home
        self._workers[number] = worker
        if worker != home or not is_held:
            self._newest.pop(number, None)
        source = home if is_held and worker != home else None
        return Place(worker, is_held and worker == home, source)

    def _share(self, num_alive: int) -> int:
        return math.ceil(self._num_leases / num_alive)

    def confirm(self, number: int, version: int) -> None:
        """Note that the worker of this lease holds that version, and none newer."""
        self._newest[number] = version

    def forget_versions(self) -> None:
        """Note that x has gone back, behind what the workers hold."""
        self._newest.clear()


class Held:
    """The states that one worker holds: of each task at one or two versions of x.

    The older version stays until a lease of the newer one comes, which shows that x has made the
    step between them: until then the lease may have to be computed again.
    """

    def __init__(self) -> None:
        self._by_task: dict[int, dict[int, Tensor | None]] = {}

    def set(self, indices: Sequence[int], version: int, states: Mapping[int, Tensor]) -> None:
        """Forget what was held of these tasks and hold `states`; of the others there is none."""
        for index in indices:
            self._by_task[index] = {version: states.get(index)}

    def at(self, indices: Sequence[int], version: int) -> dict[int, Tensor]:
        """The states of these tasks at that version, where there are any.

        Raises:
            RuntimeError: They are not held.
        """
        for index in indices:
            versions = self._by_task.get(index, {})
            if version not in versions:
                raise RuntimeError(
                    f"the states of task {index} must be held at version {version} of x, got "
                    f"{sorted(versions) or 'none'}"
                )
        states = {index: self._by_task[index][version] for index in indices}
        return {index: state for index, state in states.items() if state is not None}

    def step(self, indices: Sequence[int], version: int, states: Mapping[int, Tensor]) -> None:
        """Hold `states` at the version after that one, beside what is held at that one.

        A task whose hypergradient was dropped has no new state and keeps the one before.
        """
        for index in indices:
            before = self._by_task[index][version]
            self._by_task[index] = {version: before, version + 1: states.get(index, before)}

    def let_go(self, indices: Sequence[int]) -> None:
        """Forget these tasks, which another worker holds from now on."""
        for index in indices:
            self._by_task.pop(index, None)


def check_room(states: Mapping[int, Tensor], num_tasks: int, device: torch.device) -> None:
    """Raise ValueError if the memory of `device` does not hold such states of so many tasks."""
    size = max((state.nbytes for state in states.values()), default=0)
    needed, there = 2 * size * num_tasks, memory_bytes(device)
    if needed > there:
        raise ValueError(
            f"num_workers must be higher with state='worker': a worker would hold the states of "
            f"{num_tasks} tasks at two versions of x, {needed / 1e9:.3g} GB, got "
            f"{there / 1e9:.3g} GB of memory of {device}. Or lower the number of tasks, or have "
            "the algorithm keep less"
        )


@cache
def memory_bytes(device: torch.device) -> int:
    """The memory of a GPU, or what this process may have of that of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a control group, v2 and v1
        path = Path("/sys/fs/cgroup") / name
        if path.exists() and (text := path.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits)

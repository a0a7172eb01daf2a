"""Tasks that are given as they are: a single problem, or a fixed set of them."""

from __future__ import annotations

from collections.abc import Sequence

from metadist.task import Task


class FixedTasks:
    """The given tasks; for training with `keep_state`, which has all of them at every step.

        Trainer(problem, FixedTasks([task]), algorithm, meta_batch_size=1, keep_state=True)

    Beyond the last task it begins again with the first.

    Args:
        tasks: at least one; their ids are set to their positions.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if not tasks:
            raise ValueError("tasks must hold at least one task, got none")
        self.tasks = list(tasks)

    def sample(self, index: int) -> Task:
        """The task at `index`, modulo their number."""
        return self.tasks[index % len(self.tasks)]._replace(id=index)

    def __len__(self) -> int:
        return len(self.tasks)

    def __repr__(self) -> str:
        return f"FixedTasks({len(self)} tasks)"

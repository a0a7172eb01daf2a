"""Which rows of a batch belong to which set and task, told to the layers that must know."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Rows(NamedTuple):
    """What the rows of the tensors that pass through a model are.

    Args:
        num_tasks: B. The rows are example-major and task-minor, (R*B, C, H, W), so that viewed
            as (R, B*C, H, W) each channel of each task is a channel of its own.
        sets: The sizes of the sets that follow one another along R, the support set first;
            empty: one set.
    """

    num_tasks: int = 1
    sets: tuple[int, ...] = ()


class _Current(threading.local):
    def __init__(self) -> None:
        self.rows = Rows()


# A batch norm deep in a model cannot be passed an argument: the modules around it are the user's.
# A context variable would be usual here, but torch.compile cannot trace one.
_current = _Current()


def current_rows() -> Rows:
    """What `rows` says in this thread."""
    return _current.rows


@contextmanager
def rows(num_tasks: int = 1, sets: tuple[int, ...] = ()) -> Iterator[None]:
    """Within the block every `TaskBatchNorm` of this thread reads its rows as `Rows(...)`."""
    before = _current.rows
    _current.rows = Rows(num_tasks, sets)
    try:
        yield
    finally:
        _current.rows = before

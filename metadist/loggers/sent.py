"""`Sent`: which scalars a service has, that takes nothing back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from metadist.loggers.base import LoggedRun


class Sent:
    """The identity of a run with a service, and the last outer step it has of each scalar.

    A resumed run takes the steps after its last checkpoint again, with the same result; what the
    service has of them already is not sent again.

    Args:
        file: The file in the run folder that keeps both.
        run: The run; where it is another branch than before, the service gets another run.
    """

    def __init__(self, file: str, run: LoggedRun) -> None:
        self._path = run.folder / file
        self._is_repeating = run.step is not None
        self.identity: str | None = None
        self._last: dict[str, int] = {}
        if run.is_branch:
            return
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            found: Any = json.loads(self._path.read_text())
            self._last = {str(name): int(last) for name, last in found["last"].items()}
            self.identity = str(found["id"])

    def unsent(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The values that the service does not have yet."""
        if not self._is_repeating:
            return dict(values)
        return {name: value for name, value in values.items() if step > self._last.get(name, -1)}

    def keep(self, step: int = 0, names: Iterable[str] = ()) -> None:
        """Remember the identity, and that the service has these scalars of a step."""
        for name in names:
            self._last[name] = max(step, self._last.get(name, -1))
        part = self._path.with_name(f".{self._path.name}.part")
        part.write_text(json.dumps({"id": self.identity, "last": self._last}))
        os.replace(part, self._path)

"""A dummy of Ray and of the clock: calls end when and how the test says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import exceptions

from metadist.cluster.actors.pool import Runtime


class DummyCall:
    """A call of an actor; `answer` is what it returns or raises, None while it runs."""

    answer: object = None


class DummyRuntime(Runtime):
    """Time passes only where something waits for it."""

    look_s = float("inf")

    def __init__(self) -> None:
        self.time = 1000.0
        self.killed: list[object] = []
        self.gone = False
        self.stopping: set[str] = set()

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def put(self, value: Any) -> Any:
        call = DummyCall()
        call.answer = value
        return call

    def ready(self, refs: Sequence[Any], limit_s: float = 0.0) -> list[Any]:
        ready = [ref for ref in refs if ref.answer is not None]
        if not ready:
            assert limit_s < float("inf"), "it would wait for ever"
            self.time += limit_s
        return ready

    def get(self, refs: Any, timeout_s: float | None = None) -> Any:
        if isinstance(refs, list):
            return [self.get(ref, timeout_s) for ref in refs]
        if refs.answer is None:
            assert timeout_s is not None, "it would wait for ever"
            self.time += timeout_s
            raise exceptions.GetTimeoutError
        if isinstance(refs.answer, Exception):
            raise refs.answer
        return refs.answer

    def draining(self) -> frozenset[str]:
        return frozenset(self.stopping)

    def this_node(self) -> str:
        return "driver's"

    def is_gone(self) -> bool:
        return self.gone

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)

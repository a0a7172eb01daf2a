"""How lost actors are tried again, and how answers of many are waited for."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray import ObjectRef


@dataclass(frozen=True)
class Retry:
    """How often and how soon lost workers and leases are tried again.

    Args:
        max_losses: a worker, a lease or the server that is lost so often in a row ends the run.
        backoff_s: pause before a lost worker is tried again; doubles with every loss in a row.
        max_backoff_s: the longest pause.
        all_lost_s: the run ends when no worker has been alive for so long.
        lease_s: a worker that computes one lease for longer is taken for lost; None: never.
        backup_factor: a lease that takes so many times as long as is usual is given to an idle
            worker too; None: never.
    """

    max_losses: int = 5
    backoff_s: float = 0.5
    max_backoff_s: float = 10.0
    all_lost_s: float = 300.0
    lease_s: float | None = None
    backup_factor: float | None = None

    def __post_init__(self) -> None:
        if self.max_losses < 1:
            raise ValueError(f"max_losses must be >= 1, got {self.max_losses}")
        for name in ("backoff_s", "max_backoff_s", "all_lost_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.lease_s is not None and self.lease_s <= 0:
            raise ValueError(
                f"lease_timeout_s must be > 0 or None for no limit, got {self.lease_s}"
            )
        if self.backup_factor is not None and not self.backup_factor >= 1:
            raise ValueError(
                f"backup_factor must be >= 1 or None for no backup leases, got {self.backup_factor}"
            )

    def pause_s(self, num_losses: int) -> float:
        """The pause after so many losses in a row, >= 1."""
        return float(min(self.max_backoff_s, self.backoff_s * 2 ** (num_losses - 1)))


def wait_for_any(refs: list[ObjectRef[Any]], limit_s: float) -> list[ObjectRef[Any]]:
    """Those that are ready as soon as one is, or after `limit_s`, which may be infinite.

    All that are ready at once, so that no worker is preferred for its place in the list.
    """
    if not refs:
        time.sleep(limit_s)
        return []
    ray.wait(refs, num_returns=1, timeout=None if limit_s == math.inf else limit_s)
    return list(ray.wait(refs, num_returns=len(refs), timeout=0)[0])

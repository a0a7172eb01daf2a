"""How answers of many actors are waited for."""

from __future__ import annotations

import math
import time
from typing import Any

import ray
from ray import ObjectRef


def wait_for_any(refs: list[ObjectRef[Any]], limit_s: float) -> list[ObjectRef[Any]]:
    """Those that are ready as soon as one is, or after `limit_s`, which may be infinite.

    All that are ready at once, so that no worker is preferred for its place in the list.
    """
    if not refs:
        time.sleep(limit_s)
        return []
    ray.wait(refs, num_returns=1, timeout=None if limit_s == math.inf else limit_s)
    return list(ray.wait(refs, num_returns=len(refs), timeout=0)[0])

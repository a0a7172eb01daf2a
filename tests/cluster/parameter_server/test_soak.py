"""The long run of scripts/benchmarks/soak.py, shorter."""

from __future__ import annotations

import pytest

from tests.cluster.processes import ROOT
from tests.helpers import finish, start

SOAK = str(ROOT / "scripts" / "benchmarks" / "soak.py")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", ["bsp", "asp"])
def test_memory_does_not_grow_with_the_leases(tmp_path, policy):
    outcome = finish(start([SOAK, "--leases", "4000", "--policy", policy], tmp_path), 3000)
    assert outcome.code == 0, outcome.out + outcome.err
    assert "second half" in outcome.out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_grows_is_named(tmp_path):
    arguments = [SOAK, "--leases", "160", "--tolerance_mib", "-10000"]
    outcome = finish(start(arguments, tmp_path), 900)
    assert outcome.code == 1, outcome.err
    for role in ("driver", "workers", "server", "object store"):
        assert f"{role} grew by " in outcome.out

"""Ray's own memory monitor kills the parameter server: the run resumes from its snapshot."""

from __future__ import annotations

import tempfile

import pytest

from tests.cluster.processes import Script
from tests.cluster.toy import local_run, state_bytes

MEMORY = """
import logging, os
from pathlib import Path

def share_used():
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1 - sizes["MemAvailable"] / sizes["MemTotal"]

# Far enough above what is used now for the processes of this test, and of others beside it.
limit = share_used() + 0.25
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_memory_usage_threshold": str(limit),
    "RAY_memory_monitor_refresh_ms": "100",
}
import ray
from metadist.cluster import Failures, RayExecutor
from tests.cluster.toy import ADAM, first_state, make_workload, state_bytes

logging.basicConfig(level=logging.WARNING)
ray.init(
    address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20,
    log_to_driver=False,
)
# Ray prefers to kill workers. They stay away for so long that the server is the only one left.
executor = RayExecutor(failures=Failures(max_losses=50, backoff_s=10.0, max_backoff_s=10.0))
executor.start(make_workload(), ADAM, first_state())
supervisor, ballast = executor._supervisor, []
replace = supervisor.replace

def free_and_replace(error):
    ballast.clear()
    replace(error)

supervisor.replace = free_and_replace
lost = 0
for report in executor.run(6):
    lost += report.lost_servers
    if report.step.version == 3 and not lost:
        while share_used() < limit + 0.01:
            ballast.append(b"x" * (1 << 27))
        # The next step waits behind this until the monitor has killed the server.
        supervisor.server.__ray_call__.remote(lambda _: __import__("time").sleep(30))
print(lost, state_bytes(executor.state()).hex())
executor.close()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_ray_kills_for_its_memory_changes_no_byte():
    with tempfile.TemporaryDirectory(prefix="m") as home:
        output, errors = Script(MEMORY, home).finish(300)
    lost, found = output.split()
    assert int(lost) >= 1
    assert bytes.fromhex(found) == state_bytes(local_run(6)[0])
    assert "memory" in errors

"""What Ray's metrics endpoint tells of a run is what the reports tell."""

from __future__ import annotations

import re
import urllib.request
from collections import Counter, defaultdict

import ray

from metadist.cluster import Workers
from metadist.cluster.actors.metrics import RunMetrics
from metadist.outer import LeaseResult
from tests.cluster.toy import Deadly, make_workload
from tests.helpers import becomes
from tests.run.test_monitor import report


def scraped(run: str) -> dict[tuple[str, str], float]:
    """(name, worker or upper end of a bin) -> value, of this run's metrics on this node."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = defaultdict(float)
    lines = re.finditer(r"^ray_metadist_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    for name, labels, value in (line.groups() for line in lines):
        label = re.search(r'(?:worker|le)="([^"]*)"', labels)
        if f'run="{run}"' in labels:
            found[name, label[1] if label else ""] += float(value)
    return found


def test_the_endpoint_tells_what_was_done(executor, tmp_path):
    """A run of 3 steps in which a worker dies; then a report of what is rare."""
    workload = make_workload(Deadly(indices=(5,), folder=str(tmp_path)))
    started = executor(workload, workers=Workers(num_workers=2))
    metrics = RunMetrics("mine")
    RunMetrics("other").observe(report(99, [], num_workers=1))
    reports = list(metrics.watch(started.run(3)))
    assert [found.step.version for found in reports] == [1, 2, 3]
    dropping = LeaseResult(12, 3, 3, (7, 8), {}, 0.1, 0.2)
    last = report(
        4, [dropping], lost_workers=2, reissued=(12,), lost_servers=1, seconds=2.0, waiting_s=1.0
    )
    step = last.step._replace(applied=(12,), repeated=(3, 4), staleness=(6,))
    metrics.observe(last._replace(step=step))
    becomes(lambda: scraped("mine")["version", ""] == 4)
    found = scraped("mine")
    done = Counter(found.worker for item in reports for found in item.results) + Counter(
        ["worker-0"]
    )
    assert sum(done.values()) == 13
    for worker, number in done.items():
        assert found["leases_total", worker] == number
        assert found["tasks_total", worker] == number + 2 * (worker == "worker-0")
    lost = sum(item.lost_workers for item in reports)
    again = sum(len(item.reissued) for item in reports)
    assert lost >= 1 and again >= 1
    assert found["workers_lost_total", ""] == lost + 2
    assert found["leases_reissued_total", ""] == again + 1
    assert found["servers_lost_total", ""] == 1
    assert found["tasks_dropped_total", ""] == 2
    assert found["leases_repeated_total", ""] == 2
    assert found["staleness_count", ""] == 13
    # Ray sums the middles of the bins: only these are exact.
    assert (found["staleness_bucket", "0.5"], found["staleness_bucket", "4.0"]) == (12, 12)
    assert found["staleness_bucket", "8.0"] == 13
    assert (found["version", ""], found["workers", ""]) == (4, 2)
    assert found["waiting_share", ""] == 0.25

"""`RunMetrics`: the metrics of a run on Ray's own endpoints, beside TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ray.util.metrics import Counter, Gauge, Histogram

from metadist.executor import StepReport

STALENESS = [0.5, *(2.0**k for k in range(11))]
"""Upper ends of the histogram's bins, in versions; Ray wants them above 0."""


class RunMetrics:
    """Counters and gauges that the driver's node exports to Prometheus as `ray_metadist_...`.

    Ray must be running. `StepReport` is all that is read. The label `run` of all of them
    distinguishes runs on the same cluster.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._leases = self._counter("leases", "Leases in x", "worker")
        self._tasks = self._counter("tasks", "Tasks in x", "worker")
        self._dropped = self._counter("tasks_dropped", "Tasks without finite hypergradient")
        self._repeated = self._counter("leases_repeated", "Results that were in x before")
        self._workers_lost = self._counter("workers_lost", "Deaths of workers")
        self._servers_lost = self._counter("servers_lost", "Losses of the parameter server")
        self._reissued = self._counter("leases_reissued", "Leases handed out again")
        self._staleness = Histogram(
            "metadist_staleness", "Versions between a lease and its step", STALENESS, ("run",)
        )
        self._version = self._gauge("version", "Outer steps taken")
        self._workers = self._gauge("workers", "Workers alive")
        self._waiting = self._gauge("waiting_share", "Share of time workers had no lease")

    def watch(self, reports: Iterable[StepReport]) -> Iterator[StepReport]:
        """The same reports; each is counted before it is passed on."""
        for report in reports:
            self.observe(report)
            yield report

    def observe(self, report: StepReport) -> None:
        """Count one outer step."""
        step = report.step
        for result in report.results:
            self._add(self._tasks, result.num_tasks, worker=result.worker)
            if result.lease_id in step.applied:
                self._add(self._leases, 1, worker=result.worker)
        self._add(self._dropped, sum(len(result.dropped) for result in report.results))
        self._add(self._repeated, len(step.repeated))
        self._add(self._workers_lost, report.lost_workers)
        self._add(self._servers_lost, report.lost_servers)
        self._add(self._reissued, len(report.reissued))
        label = {"run": self._run}
        for versions in step.staleness:
            self._staleness.observe(versions, label)
        self._version.set(step.version, label)
        self._workers.set(report.num_workers, label)
        share = report.waiting_s / max(report.seconds * report.num_workers, 1e-9)
        self._waiting.set(min(1.0, share), label)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"metadist_{name}", text, ("run", *labels))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"metadist_{name}", text, ("run",))

    def _add(self, counter: Counter, number: int, **labels: str) -> None:
        if number:  # Ray refuses 0
            counter.inc(number, {"run": self._run, **labels})

"""How a run reports to its loggers while it lasts."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from metadist.evaluation import EvaluationResult
from metadist.executor import StepReport
from metadist.loggers.base import Bearing, LoggedRun, Logger
from metadist.loggers.tensor_board import TensorBoardLogger
from metadist.outer import LeaseResult
from metadist.run.names import scalar_name, width_name
from metadist.task import Task

log = logging.getLogger("metadist.run.monitor")

LOCAL = LeaseResult(0, 0, 0).worker
"""The worker of a run without workers."""
MAX_IMAGES = 64
"""The largest number of images of a set that are shown."""


class Monitor:
    """The loggers of a run, fed by the process that drives it.

    Args:
        loggers: Where everything goes.
        run: The run; `run.step` outer steps are taken so far.
        report: Called with the first failure of each logger, after which training continues.
        bears_open: Whether a logger may fail from the beginning; TensorBoard's always may.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        run: LoggedRun,
        report: Callable[[Logger, Exception], None] | None = None,
        bears_open: bool = True,
    ) -> None:
        self._run = run
        self._version = run.step or 0
        self._loggers: list[Bearing] = []
        try:
            for logger in loggers:
                bears = bears_open or isinstance(logger, TensorBoardLogger)
                self._loggers.append(Bearing(logger, run, report or _warn, bears))
        except BaseException:
            self.close(failed=True)
            raise
        self._staleness: list[int] = []
        self._since: Counter[str] = Counter()
        self._seconds = 0.0
        self._waiting_s = 0.0
        self._tasks = 0

    def task(self, task: Task) -> None:
        """Show the support and the query set of a task as pictures, if they are images."""
        for name, batch in (("support", task.support), ("query", task.query)):
            images = batch.tensors[0]
            if is_images(images):
                self._call("log_image", 0, f"task/{name}", grid(images))

    def step(self, report: StepReport) -> None:
        """Log one outer step.

        A step that comes again, because the server was lost, replaces those from it on.
        """
        step = report.step
        if step.version <= self._version:
            self._call("rewind", step.version)
            self._staleness.clear()
        self._version = step.version
        self._staleness += step.staleness
        self._seconds += report.seconds
        self._waiting_s += report.waiting_s
        for result in report.results:
            self._since[result.worker] += result.num_tasks
            self._tasks += result.num_tasks
        means = report.metrics
        scalars = {"outer/hypergradient_norm": step.hypergradient_norm, "outer/lr": step.lr}
        losses = {
            "tasks/dropped": sum(len(result.dropped) for result in report.results),
            "tasks/user_errors": len(report.retried),
            "workers/lost": report.lost_workers,
            "workers/lost_servers": report.lost_servers,
            "workers/reissued_leases": len(report.reissued),
        }
        scalars |= {name: count for name, count in losses.items() if count}
        scalars |= {scalar_name("train", name): value for name, value in means.items()}
        if means:
            scalars |= {f"oracle/{name}": count for name, count in calls_of(report).items()}
            scalars |= self._rates(report.num_workers)
        self._call("log_scalars", step.version, scalars)

    def _rates(self, num_workers: int) -> dict[str, float]:
        """Speeds since they were last asked for; of workers only where there are any."""
        seconds = max(self._seconds, 1e-9)
        rates = {"tasks/per_second": self._tasks / seconds}
        if set(self._since) > {LOCAL} or (self._since and LOCAL not in self._since):
            staleness = torch.tensor(self._staleness or [0])
            self._call("log_histogram", self._version, "workers/staleness", staleness)
            rates |= {
                "workers/number": float(num_workers),
                "workers/staleness_mean": float(staleness.double().mean()),
                "workers/waiting_share": self._waiting_s / (seconds * max(num_workers, 1)),
            }
            for worker, num_tasks in self._since.items():
                rates[f"workers/tasks_per_second/{worker}"] = num_tasks / seconds
        self._staleness.clear()
        self._since.clear()
        self._seconds = self._waiting_s = 0.0
        self._tasks = 0
        return rates

    def evaluation(self, split: str, result: EvaluationResult, version: int) -> None:
        """Log the means and interval half widths of an evaluation."""
        scalars: dict[str, float] = {}
        for name, interval in result.metrics.items():
            scalars[scalar_name(split, name)] = interval.mean
            scalars[width_name(scalar_name(split, name))] = interval.half_width
        if result.dropped:
            scalars[f"tasks/dropped_{split}"] = result.num_dropped
        self._call("log_scalars", version, scalars)
        self.flush()

    def scalars(self, split: str, values: Mapping[str, float]) -> None:
        """Log further metrics of the newest step."""
        named = {scalar_name(split, name): value for name, value in values.items()}
        self._call("log_scalars", self._version, named)

    def image(self, name: str, image_CHW: Tensor) -> None:
        """Log a picture of the newest step."""
        self._call("log_image", self._version, name, image_CHW)

    def histogram(self, name: str, values: Tensor) -> None:
        """Log a distribution of the newest step."""
        self._call("log_histogram", self._version, name, values)

    def flush(self) -> None:
        """Have everything so far where it belongs; open again what has failed."""
        for logger in self._loggers:
            logger.flush(self._version)

    def close(self, failed: bool = False) -> None:
        """Flush and close."""
        for logger in self._loggers:
            logger.call("close", failed)

    def _call(self, method: str, *arguments: Any) -> None:
        for logger in self._loggers:
            logger.call(method, *arguments)


def _warn(logger: Logger, error: Exception) -> None:
    log.warning("rows of %s are missing: %s", type(logger).__name__, error)


def calls_of(report: StepReport) -> Counter[str]:
    """The oracle calls of the leases of a step, by name."""
    calls: Counter[str] = Counter()
    for result in report.results:
        calls.update(result.calls)
    return calls


def is_images(tensor: Tensor) -> bool:
    """Whether a tensor holds pictures, (examples, channels, height, width)."""
    return tensor.ndim == 4 and tensor.shape[1] in (1, 3)


def grid(images_BCHW: Tensor) -> Tensor:
    """The images in rows, scaled to [0, 1], with a grey line around each."""
    images_BCHW = images_BCHW[:MAX_IMAGES].detach().float().cpu()
    num_images = len(images_BCHW)
    columns = min(10, num_images, max(1, round(math.sqrt(num_images) * 1.5)))
    rows = math.ceil(num_images / columns)
    low, high = images_BCHW.min(), images_BCHW.max()
    scaled = (images_BCHW - low) / (high - low).clamp(min=1e-5)
    blank = rows * columns - num_images
    tiles = functional.pad(scaled, (1, 0, 1, 0, 0, 0, 0, blank), value=0.5)
    image_CHW = tiles.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return functional.pad(image_CHW, (0, 1, 0, 1), value=0.5)

"""What a learner knows after each stage: the matrix of accuracies, and what is read from it."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metadist.tasks.continual.stream import ImageStream

if TYPE_CHECKING:
    from metadist.executor import StepReport
    from metadist.trainer import Trainer


@dataclass(frozen=True)
class AccuracyMatrix:
    """Row k: the accuracies on the stages 0 .. k after stage k, in [0, 1]."""

    rows: tuple[tuple[float, ...], ...]

    @property
    def accuracy(self) -> float:
        """The mean over all stages so far, after the last."""
        return float(np.mean(self.rows[-1]))

    @property
    def learning_accuracy(self) -> float:
        """The mean over stages of the accuracy right after each was learned."""
        return float(np.mean([row[-1] for row in self.rows]))

    @property
    def forgetting(self) -> float:
        """The mean over all stages but the last of the best accuracy less that after the last.

        0 with one stage. Source: Chaudhry et al., Riemannian Walk (ECCV 2018).
        """
        lost = [
            max(row[k] for row in self.rows[k:]) - self.rows[-1][k]
            for k in range(len(self.rows) - 1)
        ]
        return float(np.mean(lost)) if lost else 0.0

    def metrics(self) -> dict[str, float]:
        """All three by name."""
        return {
            "accuracy": self.accuracy,
            "forgetting": self.forgetting,
            "learning_accuracy": self.learning_accuracy,
        }

    def picture(self) -> bytes:
        """The matrix as a PNG file: stages learned downwards, stages judged to the right."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        size = len(self.rows)
        values = np.full((size, size), np.nan)
        for k, row in enumerate(self.rows):
            values[k, : k + 1] = row
        figure = Figure(figsize=(5, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.add_subplot()
        image = axes.imshow(100 * values, vmin=0, vmax=100, origin="upper")
        axes.set_xlabel("accuracy on task")
        axes.set_ylabel("after task")
        figure.colorbar(image, label="%")
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=120)
        return stream.getvalue()


class JudgeAfterEachTask:
    """Judges a training on an `ImageStream` after each stage, on all stages so far.

        judge = JudgeAfterEachTask(trainer, "accuracies.json")
        trainer.fit(stream.num_steps, judge)
        judge.matrix.metrics()

    Each stage ends in a checkpoint, if the trainer has a run folder.

    Args:
        trainer: The trainer, after `restore` if a run is resumed.
        path: A file that the rows are kept in, so that a resumed run has those of before; None:
            they are kept here only.

    Raises:
        ValueError: The sampler is no `ImageStream`, or rows are missing of stages that the trainer
            has passed.
    """

    def __init__(self, trainer: Trainer, path: str | Path | None = None) -> None:
        stream = trainer.sampler
        if not isinstance(stream, ImageStream):
            raise ValueError(
                f"trainer must have an ImageStream as its sampler, got {type(stream).__name__}"
            )
        self._trainer, self._stream = trainer, stream
        self._path = None if path is None else Path(path)
        self._rows: list[tuple[float, ...]] = []
        passed = trainer.version // stream.steps_per_stage
        if passed and self._path is not None and self._path.exists():
            kept = json.loads(self._path.read_text())
            self._rows = [tuple(row) for row in kept[:passed]]
        if len(self._rows) < passed:
            raise ValueError(
                f"path must hold a row for each of {passed} stages that the trainer has passed, "
                f"got {len(self._rows)} from {path}: give the path of the first run, or begin anew"
            )

    def __call__(self, report: StepReport) -> bool:
        """Judge if a stage ends with this step; for `Trainer.fit`."""
        stage, within = divmod(report.step.version, self._stream.steps_per_stage)
        # An earlier step where the server was lost: the end of the stage is reported again then.
        if not within and self._trainer.save() == report.step.version:
            trainer = self._trainer
            row = self._stream.accuracies(trainer.problem, trainer.outer, trainer.inner(0), stage)
            self._rows = [*self._rows[: stage - 1], tuple(row)]
            if self._path is not None:
                self._path.write_text(json.dumps(self._rows) + "\n")
        return True

    @property
    def matrix(self) -> AccuracyMatrix:
        """What was found so far; ValueError before the end of the first stage."""
        if not self._rows:
            raise ValueError("matrix needs a stage that has ended, got none: train longer")
        return AccuracyMatrix(tuple(self._rows))

"""`TensorBoardLogger`: event files for TensorBoard, which `status` and `report` read too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metadist.loggers.base import LoggedRun, Logger
from metadist.run.files import TENSORBOARD

HPARAM_METRICS = ("accuracy/test", "accuracy/val", "loss/test", "loss/val")
"""The columns of TensorBoard's table of settings."""

OVERVIEW = {
    "accuracy": "accuracy/(train|val|test)",
    "loss": "loss/(train|val|test)",
    "norm of the hypergradient": "outer/hypergradient_norm",
    "share of time in which workers wait": "workers/waiting_share",
    "tasks per second": "tasks/per_second",
}
"""The charts of TensorBoard's tab "Custom Scalars", and which scalars each shows."""


class TensorBoardLogger(Logger):
    """Event files in the folder tensorboard/ of the run, for TensorBoard.

    Every run with a folder has one. Events of steps that come again are hidden. The main curves of
    all runs are side by side under "Custom Scalars".
    """

    folders = (TENSORBOARD,)

    def __init__(self) -> None:
        self._writer: Any = None

    def open(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # late: no worker needs it

        purge_step = None if run.step is None else run.step + 1
        # Often enough to watch a running experiment; the default is two minutes.
        folder = str(run.folder / TENSORBOARD)
        self._writer = SummaryWriter(folder, purge_step=purge_step, flush_secs=5)
        if run.step is not None:
            self._log_settings(run.settings)
            # TensorBoard takes tags that begin with the pattern, such as accuracy/train_before.
            charts = {title: ["Multiline", [f"{tag}$"]] for title, tag in OVERVIEW.items()}
            self._writer.add_custom_scalars({"overview": charts})

    def _log_settings(self, settings: Mapping[str, str | int | float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self.log_text(0, "settings", f"| | |\n|---|---|\n{rows}")
        simple = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}
        # As add_hparams does it, but in this run's own folder rather than in a new one below.
        for summary in hparams(simple, dict.fromkeys(HPARAM_METRICS, 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def log_image(self, step: int, name: str, image_CHW: Tensor) -> None:
        self._writer.add_image(name, image_CHW, step)

    def log_histogram(self, step: int, name: str, values: Tensor) -> None:
        self._writer.add_histogram(name, values, step)

    def rewind(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._writer._get_file_writer().add_event(Event(session_log=start), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool = False) -> None:
        if self._writer is not None:
            self._writer.close()

"""`MlflowLogger`: a run of MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metadist.loggers.base import LoggedRun, Logger, require_package
from metadist.loggers.sent import Sent

MAX_PARAM = 500
"""The longest value of a parameter that all of MLflow's stores take."""


class MlflowLogger(Logger):
    """A run of MLflow (`pip install 'metadist[mlflow]'`), metrics by outer step.

    A resumed run continues the same one, whose id is in mlflow.json.

    Args:
        experiment: The experiment, which is made where it is missing.
        tracking_uri: The server or store; None: MLFLOW_TRACKING_URI. A database
            ("sqlite:///mlflow.db") needs the whole package mlflow, a folder ("file:mlruns") needs
            MLFLOW_ALLOW_FILE_STORE=true.
        name: The name of the run; None: that of the run folder.
    """

    files = ("mlflow.json",)

    def __init__(
        self,
        experiment: str = "metadist",
        tracking_uri: str | None = None,
        name: str | None = None,
    ) -> None:
        require_package("mlflow", "mlflow")
        self.experiment, self.tracking_uri, self.name = experiment, tracking_uri, name
        self._client: Any = None

    def open(self, run: LoggedRun) -> None:
        from mlflow import MlflowClient

        self._sent = Sent(self.files[0], run)
        self._client = MlflowClient(tracking_uri=self.tracking_uri)
        if self._sent.identity is None:
            found = self._client.get_experiment_by_name(self.experiment)
            number = found and found.experiment_id
            number = number or self._client.create_experiment(self.experiment)
            made = self._client.create_run(number, run_name=self.name or run.name)
            self._sent.identity = made.info.run_id
            self._sent.keep()
            for key, value in run.settings.items():
                self._client.log_param(made.info.run_id, key, str(value)[:MAX_PARAM])
        else:
            self._client.update_run(self._sent.identity, status="RUNNING")
        self._id = self._sent.identity

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        if unsent := self._sent.unsent(step, values):
            now = int(time.time() * 1000)
            rows = [Metric(name, float(value), now, step) for name, value in unsent.items()]
            self._client.log_batch(self._id, metrics=rows)
            self._sent.keep(step, unsent)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}.md")

    def log_image(self, step: int, name: str, image_CHW: Tensor) -> None:
        pixels = image_CHW.expand(3, -1, -1).permute(1, 2, 0).mul(255).byte().cpu().numpy()
        self._client.log_image(self._id, pixels, f"{name}/{step:08d}.png")

    def rewind(self, step: int) -> None:
        """Nothing: the rows that come again are left out, see `Sent`."""

    def close(self, failed: bool = False) -> None:
        if self._client is not None:
            self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

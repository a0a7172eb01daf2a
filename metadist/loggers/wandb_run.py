"""`WandbLogger`: a run of Weights & Biases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metadist.loggers.base import LoggedRun, Logger, require_package
from metadist.loggers.sent import Sent

STEP = "outer_step"


class WandbLogger(Logger):
    """A run of Weights & Biases (`pip install 'metadist[wandb]'`), with outer_step as the x axis.

    The environment says where it goes: WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE=offline (files in
    the run folder, for `wandb sync`). A resumed run continues the same one, whose id is in
    wandb.json.

    Args:
        project: The project.
        entity: The team or user; None: your default.
        group: The group; None: none.
        name: The name of the run; None: that of the run folder.
    """

    files = ("wandb.json",)
    folders = ("wandb",)

    def __init__(
        self,
        project: str = "metadist",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
    ) -> None:
        require_package("wandb", "wandb")
        self.project, self.entity, self.group, self.name = project, entity, group, name
        self._run: Any = None

    def open(self, run: LoggedRun) -> None:
        import wandb

        self._sent = Sent(self.files[0], run)
        self._sent.identity = self._sent.identity or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            group=self.group,
            name=self.name or run.name,
            id=self._sent.identity,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Rows of validation and test may come later than training is; W&B's own steps only grow.
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self._sent.keep()

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        if unsent := self._sent.unsent(step, values):
            self._run.log({STEP: step, **unsent})
            self._sent.keep(step, unsent)

    def log_text(self, step: int, name: str, text: str) -> None:
        self._run.summary[name] = text

    def log_image(self, step: int, name: str, image_CHW: Tensor) -> None:
        import wandb

        pixels = image_CHW.permute(1, 2, 0).mul(255).byte().cpu().numpy()
        self._log_media(step, name, wandb.Image(pixels))

    def log_histogram(self, step: int, name: str, values: Tensor) -> None:
        import wandb

        self._log_media(step, name, wandb.Histogram(values.cpu().double().tolist()))

    def _log_media(self, step: int, name: str, media: Any) -> None:
        if self._sent.unsent(step, {name: 0.0}):
            self._run.log({STEP: step, name: media})
            self._sent.keep(step, [name])

    def rewind(self, step: int) -> None:
        """Nothing: the rows that come again are left out, see `Sent`."""

    def close(self, failed: bool = False) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

"""Where the numbers of a run go, beside the run folder: CSV, Weights & Biases, MLflow, TensorBoard.

base.py         `Logger`: what all of them are
tensor_board.py `TensorBoardLogger`, which every run with a folder has
csv_file.py     `CSVLogger`
wandb_run.py    `WandbLogger`
mlflow_run.py   `MlflowLogger`
sent.py         what a service that takes nothing back has been sent already
"""

from typing import TYPE_CHECKING

from metadist.exports import lazy

if TYPE_CHECKING:
    from metadist.loggers.base import LoggedRun as LoggedRun
    from metadist.loggers.base import Logger as Logger
    from metadist.loggers.csv_file import CSVLogger as CSVLogger
    from metadist.loggers.mlflow_run import MlflowLogger as MlflowLogger
    from metadist.loggers.tensor_board import TensorBoardLogger as TensorBoardLogger
    from metadist.loggers.wandb_run import WandbLogger as WandbLogger
else:  # so that type checkers believe in no other names
    __all__, __getattr__, __dir__ = lazy(__name__)
